"""Load a whole cascade from its file, and sample pictures of captions with it."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cascade.batch import Batch, frame_key
from cascade.data.loading import on, put_rows
from cascade.diffusion.distillation import Distilled
from cascade.encoders import phrases
from cascade.encoders.identity import Encoder
from cascade.errors import UserError
from cascade.formats.texts import encodable
from cascade.pipeline import Cascade, Progress, innermost
from cascade.runs.agreement import check_links
from cascade.runs.cascade_file import CASCADE, stage_choices, stage_runs
from cascade.runs.choices import SamplingChoices
from cascade.runs.progress import bar
from cascade.runs.run import Run

LONGEST = 2000  # characters of a caption


def device() -> torch.device:
    """The device to sample on: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_cascade(
    folder: Path, choices: Sequence[str] = (), load: Callable[[Run], Any] = Run.load
) -> Cascade:
    """Load the cascade that `folder/cascade.yaml` describes, in `eval()` mode.

    Args:
        folder: or the file itself; paths of runs are relative to it.
        choices: sampling choices that override those of the file, as "stage.option=value".
        load: loads the stage of a run; it may return the same one again, which is not changed.

    Raises:
        UserError: the file, a choice or a run is not valid.
    """
    file = folder if folder.suffix == ".yaml" else folder / CASCADE
    runs, stages = stage_runs(file, choices), stage_choices(file, choices)
    asked = {name: (Run(runs[name]), SamplingChoices.of(name, of)) for name, of in stages.items()}
    loaded = {name: (run, load(run).to(device())) for name, (run, _) in asked.items()}
    check_links(loaded)
    return Cascade([asked[name][1].applied(stage, run) for name, (run, stage) in loaded.items()])


def compile_networks(cascade: Cascade) -> None:
    """Compile the network of each stage on its first use, which takes minutes.

    Raises:
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler}: install one")
    for link in cascade.stages:
        innermost(link).net.compile()


def distilled(cascade: Cascade) -> dict[str, Distilled]:
    """The processes of the cascade's distilled stages, by the key that each stage writes."""
    found = {}
    for link in cascade.stages:
        stage = innermost(link)
        if isinstance(stage.process, Distilled):
            found[link.writes] = stage.process
    return found


def captions_asked(
    texts: Sequence[str], negative: str | None = None, weights: bool = False
) -> Batch:
    """`phrases.asked` of a user's captions, for the `given` of `paint`.

    Raises:
        UserError: there are no captions, or one is empty, too long or has weights that cannot be
            read.
    """
    if not texts:
        raise UserError("no caption: give one in quotes, or a file of them with --file")
    asked = phrases.asked(texts, negative, weights)
    named = {f"caption {i}": caption for i, caption in enumerate(asked["caption"], 1)}
    if negative is not None:
        named["the negative caption"] = asked["negative"][0]
    for name, caption in named.items():
        if not caption.strip():
            raise UserError(f"{name} is empty: say what to paint")
        if encodable(caption) != caption:
            raise UserError(f"{name} is not in the terminal's encoding: use --file")
        if len(caption) > LONGEST:
            raise UserError(f"{name} has {len(caption):,} characters: {LONGEST:,} is the most")
    return asked


def frame_asked(cascade: Cascade, aspect: str, count: int) -> Batch:
    """The key of a batch by which a base stage paints `count` pictures in its nearest bucket.

    Args:
        aspect: of width to height, such as "3:2".

    Raises:
        UserError: it has another form, the base stage was not trained in buckets, or the aspect is
            beyond them.
    """
    sides = aspect.split(":")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--aspect {aspect}: give width and height, as 3:2")
    codec = innermost(cascade.painter).codec
    if not codec.buckets:
        raise UserError(
            f"--aspect {aspect}: the stage that writes {codec.writes} was trained on squares; "
            "train it with buckets=sdxl, or leave --aspect out"
        )
    width, height = map(int, sides)
    if max(width, height) > codec.buckets.widest * min(width, height):
        raise UserError(f"--aspect {aspect}: {codec.buckets.widest:g}:1 is the most")
    shape = codec.shapes[int(codec.buckets.nearest([height], [width])[0])]
    return {frame_key(codec.size): torch.tensor(shape).expand(count, 2)}


def check_asked(cascade: Cascade, asked: Batch, guided: bool = False) -> None:
    """Raise UserError if negative captions or weighted phrases would have no effect.

    Args:
        asked: the keys of `phrases.asked`.
        guided: whether some stage is guided in any case.
    """
    if "negative" in asked and not guided and not any(link.leads_away for link in cascade.stages):
        raise UserError(
            "a negative caption has no effect: no stage that reads captions is guided; give one a "
            "scale other than 1, such as --set decoder.scale=2"
        )
    for of in (asked, phrases.away_from(asked, ()) if "negative" in asked else {}):
        for caption, some in zip(of.get("caption", ()), of.get("phrases", ())):
            for phrase in some:
                for encoder in encoders_of(cascade):
                    phrases.tokens_of(encoder, caption, phrase)


def encoders_of(cascade: Cascade) -> list[Encoder]:
    """The encoders of all stages."""
    return [encoder for link in cascade.stages for encoder in innermost(link).encoders]


def paint(
    cascade: Cascade,
    captions: Sequence[str],
    seed: int,
    size: int = 16,
    given: Batch | None = None,
    what: str = "painting",
    progress: Progress | None = None,
) -> Batch:
    """Sample one picture of each caption; returns what all stages wrote, on the CPU.

    Row i has the sample number i, so that batches of any size give the same draws.

    Args:
        size: of a batch.
        given: further keys, with one row per caption: what the cascade then need not sample, or
            what goes with the captions (`phrases.asked`).
        what, progress: as of `in_batches`.
    """

    def sample(batch: Batch, report: Progress) -> Batch:
        done = cascade(batch, seed, report)
        return {stage.writes: done[stage.writes] for stage in cascade.stages}

    return in_batches(sample, captions, size, given, what, progress)


@torch.inference_mode()
def in_batches(
    sample: Callable[[Batch, Progress], Batch],
    captions: Sequence[str],
    size: int = 16,
    given: Batch | None = None,
    what: str = "painting",
    progress: Progress | None = None,
) -> Batch:
    """Call a function with some rows at a time; returns the tensors it returns, on the CPU.

    Args:
        sample: is given `caption`, `sample` and the rows of `given`, and reports its progress.
        size: of a batch.
        given: further keys, with one row per caption. Row i has the sample number i, unless
            `sample` is given as well.
        what: title of the progress bar.
        progress: is told of each step in place of the bar.
    """
    painted: Batch = {}
    with (
        _steps(what, len(captions), progress) as (report, finished),
        torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    ):
        for start in range(0, len(captions), size):
            rows = slice(start, start + size)
            batch: Batch = {"caption": list(captions[rows])}
            batch["sample"] = torch.arange(start, start + len(batch["caption"]))
            batch |= on({k: v[rows] for k, v in (given or {}).items()}, device())
            made = {key: value.float().cpu() for key, value in sample(batch, report).items()}
            put_rows(painted, made, start, len(captions))
            finished(start + len(batch["caption"]))
    return painted


@contextmanager
def _steps(
    what: str, total: int, progress: Progress | None
) -> Iterator[tuple[Progress, Callable[[int], None]]]:
    """Give a function that is told of each step, and one that is told how many rows are done."""
    if progress is not None:
        yield progress, lambda count: None
        return
    with bar(what, "pictures") as shown:
        task = shown.add_task("", total=total, rate=0, note="")

        def report(key: str, i: int, n: int, value: Callable[[], torch.Tensor]) -> None:
            shown.update(task, note=f"{key} {i}/{n}")

        def finished(count: int) -> None:
            shown.update(task, completed=count, rate=count / (shown.tasks[0].elapsed or 1))

        yield report, finished
