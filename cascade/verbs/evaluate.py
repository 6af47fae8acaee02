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
from cascade.data.lease import lease
from cascade.data.scenes import Scene
from cascade.data.shards import Shards, collate, put_rows
from cascade.data.splits import described
from cascade.data.transforms import Pictures
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.eval.attribution import attribution, superresolution
from cascade.eval.features import CLIPFeatures
from cascade.eval.geneval import level_of, measure, prompts, write_lines
from cascade.eval.prior import measure_prior
from cascade.eval.protocol import HeldOut, Metrics, distance, picture_metrics, without_text
from cascade.eval.summary import write_report
from cascade.files import check_writable, write_atomically
from cascade.grids import to_uint8
from cascade.pipeline import Cascade
from cascade.stage import Stage
from cascade.training.checkpoint import Checkpoint, newest_checkpoint
from cascade.verbs.checks import check_split
from cascade.verbs.data import EMBEDDINGS
from cascade.verbs.sample import device, load_cascade, paint
from cascade.verbs.unseen import check_unseen
from cascade.verbs.whole import CASCADE, stage_runs


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Returns what an evaluation of a model has left: numbers and the report."""
    if args.pictures:
        from cascade.verbs import score  # most evaluations need none of it

        score.main(args)
        return []
    if not (args.data and args.judge):
        raise UserError("--model is measured on --data SHARDS with a --judge CLIP: give both")
    if not Path(args.judge).is_dir():
        raise UserError(f"--judge {args.judge} is no directory: give that of a CLIP")
    try:
        scales = "1,2,4" if args.guidance is None else args.guidance
        guidance = [float(scale) for scale in scales.split(",") if scale]
    except ValueError:
        raise UserError(f"--guidance {args.guidance}: give scales such as 1,2,4") from None
    geneval = args.geneval or 0
    if geneval < 0:
        raise UserError(f"--geneval {geneval}: give a number of prompts, or leave it out")
    model = Path(args.model)
    out = Path(args.out) if args.out else model.parent if model.suffix == ".yaml" else model
    check_writable(out, "choose another --out")
    with lease(out):
        evaluate(
            model,
            Path(args.data),
            Path(args.judge),
            {args.split or "val": 320 if args.count is None else args.count},
            guidance,
            args.seed or 0,
            choices=args.set,
            out=out,
            geneval=geneval,
        )
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")
    return [out / "metrics.json", out / "report.html"]


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
    geneval: int = 0,
) -> Path:
    """Measures a cascade; returns the folder of metrics.json and report.html.

    Args:
        counts: captions of each kind (one object, two) by split; the first split is swept and
            taken apart stage by stage, the others are measured beside it.
        guidance: scales of the first painting stage.
        targets: by measure (a dotted path into the metrics), "at_least" or "at_most".
        geneval: prompts of each of GenEval's tasks, of such scenes as the first split has.

    Raises:
        UserError: the data lack what the cascade is measured with.
    """
    begin = time.monotonic()
    file = model if model.suffix == ".yaml" else model / CASCADE
    out = out or file.parent
    for split in counts:
        check_split(data, split)
    cascade, runs = load_cascade(file, choices), stage_runs(file, choices)
    for split in counts:
        check_unseen(runs.values(), data, split)
    writers = dict(zip((stage.writes for stage in cascade.stages), runs.values()))
    checkpoint = newest_checkpoint(writers["clip_image"]) if "clip_image" in writers else None
    clip = FrozenCLIP(str(judge)).to(device())
    features = CLIPFeatures(clip)
    main_split = next(iter(counts))
    metrics: Metrics = {"features": features.name, "captions": dict(counts), "seed": seed}
    metrics["captions_are"] = {split: described(split) for split in counts}
    shown: dict[str, Batch] = {}
    for split, count in counts.items():
        held_out = held_out_split(data, split, count, cascade, data / EMBEDDINGS)
        check(cascade, held_out, geneval, data)
        painted = paint(cascade, held_out.captions, seed, what=split)
        shown[split] = _evenly(painted, held_out.captions)
        metrics[split] = picture_metrics(painted, held_out, held_out.truth, features, clip)
        metrics[split]["count"] = len(held_out)
        if split == main_split:
            metrics |= _stage_by_stage(
                cascade, list(runs), held_out, painted, features, seed, checkpoint
            )
            metrics["real_halves"] = _halves(held_out.truth, features)
            metrics["guidance"] = _sweep(cascade, held_out, painted, guidance, features, clip, seed)
            shown["truth"] = _evenly(held_out.truth, held_out.captions)
            level = level_of(held_out.scenes) if geneval else None
        del held_out, painted  # pictures by the hundred, before as many more are decoded
    if geneval:
        metrics["geneval"] = _geneval(cascade, level, geneval, seed, out)
    metrics["seconds"] = round(time.monotonic() - begin, 1)
    if targets:
        metrics["targets"] = _against(targets, metrics)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(out / "metrics.json", lambda path: path.write_text(text))
    write_report(out / "report.html", file.parent, metrics, shown)
    return out


def check(cascade: Cascade, data: HeldOut, geneval: int, folder: Path) -> None:
    """Raises UserError where the data lack what the cascade is to be measured with."""
    last = cascade.stages[-1].writes
    if "clip_image" in {s.writes for s in cascade.stages} and "clip_image" not in data.truth:
        raise UserError(f"{folder} has no embeddings: `cascade data precompute` makes them")
    if geneval and not data.scenes:
        raise UserError(f"{folder} has no scenes: leave --geneval out, and use its own scorer")
    if geneval and data.truth[last].shape[-1] < 64:
        raise UserError(f"--geneval reads pictures of 64 px or more, not {last}")


def _geneval(cascade: Cascade, level: str, count: int, seed: int, out: Path) -> Metrics:
    """The scores; prompts and results, picture by picture, lie beside the metrics."""

    def pictures(captions: Sequence[str], task: str) -> Any:
        done = paint(cascade, captions, seed, what=f"GenEval, {task}")
        return to_uint8(done[cascade.stages[-1].writes])

    asked = prompts(level, count, seed)
    scores, lines = measure(asked, pictures)
    write_lines(out / "geneval_prompts.jsonl", asked)
    write_lines(out / "geneval_results.jsonl", lines)
    return {"level": level, **scores}


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
    cascade: Cascade,
    names: Sequence[str],
    data: HeldOut,
    painted: Batch,
    features: CLIPFeatures,
    seed: int,
    checkpoint: Checkpoint | None,
) -> Metrics:
    def repaint(cascade: Cascade, captions: Sequence[str], given: Batch, what: str) -> Batch:
        return paint(cascade, captions, seed, given=given, what=what)

    some = data.first(5 * features.dim)
    begun = {key: value[: len(some)] for key, value in painted.items()}
    table = attribution(cascade, names, some, begun, features, repaint)
    out: Metrics = {"attribution": table}
    if beside := superresolution(cascade, some, table, features):
        out["superresolution"] = beside
    if "clip_image" in painted:
        out["prior"] = measure_prior(cascade, data, painted["clip_image"], repaint, checkpoint)
        rows = data.kind("one") or list(range(len(data)))
        some = data.where(rows)
        small = without_text(cascade_to(cascade, 64))
        for name, z in (("prior", painted), ("truth", data.truth)):
            done = repaint(
                small, some.captions, {"clip_image": z["clip_image"][rows]}, f"no text, {name}"
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
        reached = value is not None and (value >= least if most is None else value <= most)
        asked = f"at least {least}" if most is None else f"at most {most}"
        row = {"what": target["what"], "asked": asked, "measured": value, "reached": reached}
        rows.append({"path": path, **row})
    return rows
