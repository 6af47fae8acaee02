"""`cascade sample`: captions to pictures, through a whole cascade.

A cascade is a directory with `cascade.yaml`: its stages in order, and the sampling choices of each,
which are the arguments of `chosen`. A stage's run has its name and lies beside the file, unless
`run` says where.
"""

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from functools import partial
from operator import index
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from cascade.conditioning import Batch
from cascade.data.shards import put_rows
from cascade.diffusion import guidance
from cascade.errors import UserError
from cascade.eval.prompts import read
from cascade.files import check_writable
from cascade.grids import grid, to_uint8
from cascade.pipeline import BestOf, Cascade, Link, TextEmbedding, Untold
from cascade.stage import Stage
from cascade.texts import encodable
from cascade.training.callbacks import bar
from cascade.verbs.configuration import built, composed, loaded
from cascade.verbs.overrides import assigned
from cascade.verbs.train import load
from cascade.verbs.whole import CASCADE, stage_choices, stage_runs

LONGEST = 2000  # characters of a caption


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png file")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another --out, or add --overwrite")
    check_writable(out.parent, "choose another --out")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch are at least 1")
    listed = [prompt.text for prompt in read(Path(args.file))] if args.file else []
    captions = checked([*args.captions, *listed])
    cascade = load_cascade(Path(args.model), args.set)
    repeated = [caption for caption in captions for _ in range(args.n)]
    batch = paint(cascade, repeated, args.seed, args.batch)
    pictures = to_uint8(batch[cascade.stages[-1].writes])
    out.parent.mkdir(parents=True, exist_ok=True)
    if len(repeated) == 1:
        Image.fromarray(pictures[0]).save(out)
    else:
        grid(pictures, columns=min(args.n if args.n > 1 else 4, 8), captions=repeated).save(out)
    print(f"{len(pictures)} pictures of {pictures.shape[1]} px: {out}")


def checked(captions: Sequence[str]) -> list[str]:
    """The captions; UserError if there is none, or an empty or endless one."""
    if not captions:
        raise UserError("no caption: give one in quotes, or a file of them with --file")
    for i, caption in enumerate(captions):
        if not caption.strip():
            raise UserError(f"caption {i + 1} is empty: say what to paint")
        if encodable(caption) != caption:
            raise UserError(f"caption {i + 1} is not in the terminal's encoding: use --file")
        if len(caption) > LONGEST:
            raise UserError(
                f"caption {i + 1} has {len(caption):,} characters: {LONGEST:,} is the most"
            )
    return list(captions)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_cascade(folder: Path, choices: Sequence[str] = ()) -> Cascade:
    """The cascade that `folder/cascade.yaml` describes.

    Args:
        folder: or such a file; the runs lie beside it.
        choices: sampling choices that take the place of the file's, as "stage.option=value".
    """
    file = folder if folder.suffix == ".yaml" else folder / CASCADE
    runs, stages = stage_runs(file, choices), stage_choices(file, choices)
    asked = [(runs[name], known(name, of)) for name, of in stages.items()]
    return Cascade([chosen(load(run).to(device()), run, **of) for run, of in asked])


def known(name: str, choices: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of `chosen` for a stage. UserError if one is unknown, or no such thing."""
    names, whole = list(inspect.signature(chosen).parameters)[2:], (index, "a whole number")
    kinds = {"steps": whole, "best_of": whole, "interval": (_interval, "[low, high]")}
    kinds |= {"weaker": (str, "the name of a run"), "sampler": (str, "a name of conf/sampler/")}
    kinds |= {"without": (_sources, "[caption] or [clip_image]"), "text_embedding": (_yes, "true")}
    known = {}
    for choice, value in (choices or {}).items():
        if choice == "run" or value is None:
            continue
        if choice not in names:
            raise UserError(f"{name}.{choice}: the choices of a stage are {', '.join(names)}")
        kind, what = kinds.get(choice, (float, "a number"))
        try:
            known[choice] = kind(value)
        except (TypeError, ValueError):
            raise UserError(f"{name}.{choice}={value}: give {what}") from None
    return known


def _sources(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not set(value) <= {"caption", "clip_image"}:
        raise ValueError
    return tuple(value)


def _yes(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _interval(value: Any) -> tuple[float, float]:
    low, high = value
    return float(low), float(high)


def chosen(
    stage: Stage,
    run: Path,
    scale: float | None = None,
    steps: int | None = None,
    interval: tuple[float, Annotated[float, "inf"]] | None = None,
    rescale: float | None = None,
    percentile: float | None = None,
    level: float | None = None,
    weaker: str | None = None,
    best_of: int = 1,
    sampler: str | None = None,
    without: Sequence[str] = (),
    text_embedding: bool = False,
) -> Link:
    """A stage with the sampling choices that are given.

    Args:
        run: its directory.
        scale, steps, interval: of its sampler.
        rescale: guidance is rescaled, by so much.
        percentile: x0 is thresholded dynamically, at this one.
        level: of the noise in the low-resolution picture.
        weaker: the run beside this one from which guidance leads away (autoguidance).
        best_of: so many samples, of which the closest to the caption is kept.
        sampler: another one than the run's, of conf/sampler/; the other choices are of it.
        without: sources ("caption", "clip_image") that the stage is not told.
        text_embedding: nothing is sampled; the caption's CLIP embedding stands for the picture's.

    Raises:
        UserError: a choice that this run's sampler does not have, or one out of range.
    """
    if percentile is not None and not 0 < percentile <= 1:
        raise UserError(f"percentile={percentile}: it is above 0 and at most 1")
    if text_embedding:
        return TextEmbedding(stage)
    if sampler is not None:
        stage.sampler = built(composed("sampler", [assigned("sampler", sampler)]).sampler)
    picked = {"scale": scale, "steps": steps, "interval": interval}
    if rescale is not None:
        picked["guide"] = partial(guidance.rescale, phi=rescale)
    if percentile is not None:
        picked["threshold"] = partial(guidance.dynamic_threshold, percentile=percentile)
    picked = {option: value for option, value in picked.items() if value is not None}
    has = {field.name for field in dataclasses.fields(stage.sampler)}
    if unknown := sorted(picked.keys() - has):
        raise UserError(f"{run}: {type(stage.sampler).__name__} has no {unknown[0]}")
    stage.sampler = dataclasses.replace(stage.sampler, **picked)
    if level is not None:
        if stage.corruption is None:
            raise UserError(f"{run}: its input is not corrupted, so it has no level")
        stage.corruption = dataclasses.replace(stage.corruption, level=level)
    if weaker is not None:
        stage.weaker = _weaker(run, run.parent / weaker)
    link = Untold(stage, tuple(without)) if without else stage
    return BestOf(link, best_of) if best_of > 1 else link


def _weaker(run: Path, other: Path) -> Stage:
    stages = [loaded(folder / "config.yaml").stage for folder in (run, other)]
    for part in ("codec", "process"):
        if stages[0].get(part) != stages[1].get(part):
            raise UserError(f"weaker={other.name}: its {part} is not that of {run.name}")
    return load(other).to(device())


@torch.inference_mode()
def paint(
    cascade: Cascade,
    captions: Sequence[str],
    seed: int,
    size: int = 16,
    given: Batch | None = None,
    what: str = "painting",
) -> Batch:
    """One picture for each caption, `size` at a time; sample i draws by its place in the list.

    Args:
        given: further keys, of as many rows as captions, which the cascade need not write.
    """
    painted: dict[str, torch.Tensor] = {}
    with (
        bar(what, "pictures") as progress,
        torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    ):
        task = progress.add_task("", total=len(captions), rate=0, note="")
        for start in range(0, len(captions), size):
            rows = slice(start, start + size)
            batch = {k: v[rows].to(device()) for k, v in (given or {}).items()}
            batch["caption"] = list(captions[rows])
            batch["sample"] = torch.arange(start, start + len(batch["caption"]))

            def report(key: str, i: int, n: int) -> None:
                progress.update(task, note=f"{key} {i}/{n}")

            done = cascade(batch, seed, report)
            made = {stage.writes: done[stage.writes].float().cpu() for stage in cascade.stages}
            put_rows(painted, made, start, len(captions))
            seconds = progress.tasks[0].elapsed or 1
            count = start + len(batch["caption"])
            progress.update(task, completed=count, rate=count / seconds)
    return painted
