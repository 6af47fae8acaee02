"""`cascade evaluate`: every number of a cascade, as metrics.json and as a report to look at."""

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cascade.conditioning import Batch
from cascade.data.embeddings import Embeddings
from cascade.data.scenes import Scene
from cascade.data.shards import Shards, collate, put_rows
from cascade.data.transforms import Pictures
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.eval.features import CLIPFeatures
from cascade.eval.protocol import (
    HeldOut,
    Metrics,
    distance,
    picture_metrics,
    prior_metrics,
    superresolution_metrics,
    without_text,
)
from cascade.eval.summary import write_report
from cascade.files import write_atomically
from cascade.pipeline import Cascade
from cascade.stage import Stage
from cascade.verbs.data import EMBEDDINGS
from cascade.verbs.sample import device, load_cascade, paint


def main(args: argparse.Namespace) -> None:
    try:
        guidance = [float(scale) for scale in args.guidance.split(",") if scale]
    except ValueError:
        raise UserError(f"--guidance {args.guidance}: give scales such as 1,2,4") from None
    out = evaluate(
        Path(args.model),
        Path(args.data),
        Path(args.judge),
        {args.split: args.count},
        guidance,
        args.seed,
        choices=args.set,
        out=Path(args.out or args.model),
    )
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")


def evaluate(
    model: Path,
    data: Path,
    judge: Path,
    counts: Mapping[str, int],
    guidance: Sequence[float],
    seed: int,
    targets: Mapping[str, Any] | None = None,
    choices: Sequence[str] = (),
    out: Path | None = None,
) -> Path:
    """Measures a cascade; returns the folder of metrics.json and report.html.

    Args:
        counts: captions of each kind (one object, two) by split; the first split is swept and
            taken apart stage by stage, the others are measured beside it.
        guidance: scales of the first painting stage.
        targets: by measure (a dotted path into the metrics), "at_least" or "at_most".
    """
    out = out or model
    begin = time.monotonic()
    cascade = load_cascade(model, choices)
    clip = FrozenCLIP(str(judge)).to(device())
    features = CLIPFeatures(clip)
    main_split = next(iter(counts))
    metrics: Metrics = {"features": features.name, "captions": dict(counts), "seed": seed}
    shown: dict[str, Batch] = {}
    for split, count in counts.items():
        held_out = held_out_split(data, split, count, cascade, data / EMBEDDINGS)
        painted = paint(cascade, held_out.captions, seed, what=split)
        shown[split] = _evenly(painted, held_out.captions)
        metrics[split] = picture_metrics(painted, held_out, held_out.truth, features, clip)
        metrics[split]["count"] = len(held_out)
        if split == main_split:
            metrics |= _stage_by_stage(cascade, held_out, painted, features, seed)
            metrics["real_halves"] = _halves(held_out.truth, features)
            metrics["guidance"] = _sweep(cascade, held_out, painted, guidance, features, clip, seed)
            shown["truth"] = _evenly(held_out.truth, held_out.captions)
        del held_out, painted  # pictures by the hundred, before as many more are decoded
    metrics["seconds"] = round(time.monotonic() - begin, 1)
    if targets:
        metrics["targets"] = _against(targets, metrics)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(out / "metrics.json", lambda path: path.write_text(text))
    write_report(out / "report.html", model, metrics, shown)
    return out


def _evenly(pictures: Batch, captions: Sequence[str], count: int = 24) -> Batch:
    """Some of the pictures with their captions: the first of each kind lie one behind the other."""
    rows = list(range(0, len(captions), max(1, len(captions) // count)))[:count]
    images = {key: value[rows] for key, value in pictures.items() if key.startswith("image_")}
    return {**images, "caption": [captions[i] for i in rows]}


def held_out_split(
    data: Path, split: str, count: int, cascade: Cascade, embeddings: Path
) -> HeldOut:
    """The first `count` captions of each kind (of any kind, if there are no scenes)."""
    sizes = [
        int(s.writes.removeprefix("image_")) for s in cascade.stages if "image" in s.writes[:5]
    ]
    stores = {"clip": Embeddings(embeddings)} if embeddings.is_dir() else None

    def shards(sizes: Sequence[int]) -> Shards:
        pictures = Pictures(tuple(sizes))
        return Shards(
            data, pictures, split, shuffle=False, embeddings=stores, json_fields=("scene",)
        )

    # What is asked for is chosen before pictures are decoded: they would not fit in memory.
    bare = shards([])
    light = collate([bare[i] for i in range(len(bare))])
    rows = list(range(min(count, len(light["caption"]))))
    if all(light["scene"]):
        found = [Scene.from_json(scene) for scene in light["scene"]]
        kinds = [[i for i, s in enumerate(found) if s.kind == kind] for kind in ("one", "two")]
        rows = sorted(kinds[0][:count] + kinds[1][:count])
    whole = shards(sizes)
    truth: dict[str, torch.Tensor] = {}
    captions, scenes = [], []
    for start in range(0, len(rows), 64):
        part = collate([whole[i] for i in rows[start : start + 64]])
        # A bad picture is replaced by another sample: caption and scene come with the picture.
        captions += part["caption"]
        scenes += part["scene"]
        tensors = {k: v for k, v in part.items() if isinstance(v, torch.Tensor) and k != "sample"}
        put_rows(truth, tensors, start, len(rows))
    return HeldOut(captions, truth, [Scene.from_json(s) for s in scenes] if all(scenes) else None)


def _stage_by_stage(
    cascade: Cascade, data: HeldOut, painted: Batch, features: CLIPFeatures, seed: int
) -> Metrics:
    def repaint(cascade: Cascade, captions: Sequence[str], given: Batch, what: str) -> Batch:
        return paint(cascade, captions, seed, given=given, what=what)

    out: Metrics = {}
    some = data.where(range(min(len(data), 5 * features.dim)))
    if sum(stage.writes.startswith("image_") for stage in cascade.stages) > 1:
        out["superresolution"] = superresolution_metrics(cascade, some, features, repaint)
    if "clip_image" in painted:
        true = data.truth["clip_image"]
        prior = next(stage for stage in cascade.stages if stage.writes == "clip_image")
        text = torch.cat(
            [
                prior.completed({"caption": data.captions[i : i + 64]})["clip_text"].cpu()
                for i in range(0, len(data), 64)
            ]
        )
        out["prior"] = prior_metrics(painted["clip_image"], text, true)
        rows = data.kind("one") or list(range(len(data)))
        some = data.where(rows)
        small = cascade_to(cascade, 64)
        for name, z in (
            ("prior", painted["clip_image"][rows]),
            ("truth", some.truth["clip_image"]),
        ):
            done = repaint(
                without_text(small), some.captions, {"clip_image": z}, f"no text, {name}"
            )
            clip = features.clip
            out[f"no_text_{name}"] = picture_metrics(done, some, some.truth, features, clip)
    return out


def cascade_to(cascade: Cascade, size: int) -> Cascade:
    """The stages up to the one that paints pictures of `size` pixels."""
    names = [stage.writes for stage in cascade.stages]
    last = names.index(f"image_{size}") if f"image_{size}" in names else len(names) - 1
    return replace(cascade, stages=cascade.stages[: last + 1])


def _halves(truth: Batch, features: CLIPFeatures) -> Metrics:
    """The distance between two halves of the real pictures: what sampling alone makes of it."""
    out: Metrics = {}
    for key, pictures in truth.items():
        if key.startswith("image_"):
            half = len(pictures) // 2
            minimum = min(4 * features.dim, half)
            out[key] = distance(features, pictures[::2][:half], pictures[1::2][:half], minimum)
            out["count"] = half
    return out


def _sweep(
    cascade: Cascade,
    data: HeldOut,
    painted: Batch,
    guidance: Sequence[float],
    features: CLIPFeatures,
    clip: FrozenCLIP,
    seed: int,
) -> list[Metrics]:
    """The same captions and noise at each scale of the first painting stage."""
    rows = list(range(0, len(data), max(1, len(data) // (4 * features.dim))))[: 4 * features.dim]
    some = data.where(rows)
    given = {k: painted[k][rows] for k in ("clip_image",) if k in painted}
    out = []
    for scale in guidance:
        if scale == _painting(cascade).sampler.scale:
            done = {key: value[rows] for key, value in painted.items()}
        else:
            altered = guided(cascade, scale)
            done = paint(altered, some.captions, seed, given=given, what=f"guidance {scale:g}")
        row = picture_metrics(done, some, data.truth, features, clip)
        out.append({"scale": scale, "count": len(some), **row})
    return out


def _painting(cascade: Cascade) -> Stage:
    return next(stage for stage in cascade.stages if stage.writes.startswith("image_"))


def guided(cascade: Cascade, scale: float) -> Cascade:
    """The cascade with another guidance scale in its first painting stage."""
    stages = list(cascade.stages)
    i = stages.index(_painting(cascade))
    stages[i] = copy.copy(stages[i])
    stages[i].sampler = replace(stages[i].sampler, scale=scale)
    return replace(cascade, stages=stages)


def _against(targets: Mapping[str, Any], metrics: Metrics) -> list[Metrics]:
    rows = []
    for path, target in targets.items():
        value: Any = metrics
        for part in path.split("."):
            value = value[part]
        least, most = target.get("at_least"), target.get("at_most")
        reached = value >= least if most is None else value <= most
        asked = f"at least {least}" if most is None else f"at most {most}"
        row = {"what": target["what"], "asked": asked, "measured": value, "reached": reached}
        rows.append({"path": path, **row})
    return rows
