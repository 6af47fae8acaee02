"""`cascade sample`: captions to pictures, through a whole cascade.

A cascade is a directory with `cascade.yaml`: the runs of its stages in order, and the sampling
choices of each (`scale`, `steps`, `best_of`, `level`).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from cascade.conditioning import Batch
from cascade.errors import UserError
from cascade.grids import grid, to_uint8
from cascade.pipeline import BestOf, Cascade
from cascade.stage import Stage
from cascade.training.callbacks import bar
from cascade.verbs.configuration import loaded
from cascade.verbs.train import load

LONGEST = 2000  # characters of a caption


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png file")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another --out, or add --overwrite")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch are at least 1")
    captions = checked([*args.captions, *_lines(args.file)])
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


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file} cannot be read as text: {error}") from error


def checked(captions: Sequence[str]) -> list[str]:
    """The captions; UserError if there is none, or an empty or endless one."""
    if not captions:
        raise UserError("no caption: give one in quotes, or a file of them with --file")
    for i, caption in enumerate(captions):
        if not caption.strip():
            raise UserError(f"caption {i + 1} is empty: say what to paint")
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
    file = folder if folder.suffix == ".yaml" else folder / "cascade.yaml"
    config, folder = loaded(file), file.parent
    for choice in choices:
        path, _, value = choice.partition("=")
        name, _, option = path.partition(".")
        if name not in config.stages or not option or not value:
            raise UserError(f"--set {choice}: not STAGE.OPTION=VALUE of {', '.join(config.stages)}")
        config.stages[name][option] = float(value) if "." in value else int(value)
    return Cascade([chosen(folder / name, **options) for name, options in config.stages.items()])


def chosen(
    run: Path,
    scale: float | None = None,
    steps: int | None = None,
    level: float | None = None,
    best_of: int = 1,
) -> Stage | BestOf:
    """The stage of a run, with the sampling choices that are given."""
    stage = load(run).to(device())
    picked = {"scale": scale, "steps": steps}
    stage.sampler = dataclasses.replace(
        stage.sampler, **{k: v for k, v in picked.items() if v is not None}
    )
    if level is not None:
        stage.corruption = dataclasses.replace(stage.corruption, level=level)
    return BestOf(stage, best_of) if best_of > 1 else stage


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
    parts: list[Batch] = []
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
            parts.append(
                {stage.writes: done[stage.writes].float().cpu() for stage in cascade.stages}
            )
            seconds = progress.tasks[0].elapsed or 1
            count = start + len(batch["caption"])
            progress.update(task, completed=count, rate=count / seconds)
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
