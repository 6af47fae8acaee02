"""Check a run, or the runs of a cascade: whether each can be read and resumed, and is unchanged.

Modules are built on the meta device: nothing is computed, and no weights are copied.
"""

import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import DictConfig
from safetensors import safe_open

from cascade.doctor.finding import Budget, Finding, note, problem, told, warning
from cascade.errors import UserError
from cascade.files.atomic import matching
from cascade.files.lease import holders
from cascade.runs.cascade_file import stage_choices, stage_runs
from cascade.runs.choices import SamplingChoices
from cascade.runs.run import Run
from cascade.slurm.state import state
from cascade.stage import WEIGHTS, Stage
from cascade.training.checkpoint import STATE, Checkpoint, newest_checkpoint

# `restore` is called for what it compares; into a module on meta it copies nothing.
warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")

T = TypeVar("T")

SILENT = 600.0  # seconds: the watchdog's limit of a step

_SLOW = "ask again with --full"
_GONE = "train it again, or put the old one back"


def model(file: Path) -> Iterator[Finding]:
    """Check a `cascade.yaml`: whether its runs exist and have what its choices need."""
    stages = stage_choices(file, ())
    yield note(f"stages: {', '.join(stages)}")
    for name, run in stage_runs(file).items():
        if not Run(run).config_file.exists():
            yield problem(f"{name}: {run} is not a run", "train it, or name its folder with `run`")
            continue
        try:
            SamplingChoices.of(name, stages[name]).applied(_unloaded(run), Run(run))
        except UserError as error:
            yield told(error, f"change what {file.name} says of {name}")


def _unloaded(run: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return Run(run).stage()


def run(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Check a run's directory.

    Args:
        budget: for reading whole files.
    """
    now = state(folder.absolute(), None)
    far = "" if now.images is None else f", {now.images:,} of {now.total or 0:,} images"
    by = f" {now.note}" if now.note else ""
    if now.word == "failed":
        yield problem(f"it failed{far}: {now.note}", "mend that, and give the same command again")
    elif now.word == "stopped" and now.total and now.images >= now.total:
        yield problem(
            f"it has seen all its images{far}, but what it made is changed or gone", _GONE
        )
    elif now.word in ("stopped", "not started"):
        yield warning(f"it is {now.word}{by}{far}", "run the same command again to resume")
    else:
        yield note(f"{now.word}{by}{far}")
    for holder in holders(folder):
        yield note(f"written to by {holder}, who holds its lease")
    run = Run(folder)
    if not run.config_file.exists():
        return
    config = run.config
    if run.status_file.exists() and not {"images", "total"} <= run.status().keys():
        yield problem(
            f"{run.status_file.name} is damaged, which says how far it is",
            "remove it, and start it again",
        )
    beat = run.last_heartbeat()
    if now.word == "running" and beat and (silent := time.time() - beat) > SILENT:
        yield warning(
            f"it is said to be running, but was silent for {silent:,.0f} s",
            "see its log; if it hangs, end it, and give the same command again",
        )
    checkpoint = None
    try:
        checkpoint, damaged = _quietly(lambda: newest_checkpoint(folder), budget)
        for line in damaged:
            yield warning(line, "nothing, or remove it: the one before it counts")
    except UserError as error:
        yield told(error)
    except TimeoutError:
        yield note(f"its checkpoints were not read: they are large, so {_SLOW}")
    if now.word != "finished":
        yield from going_on(folder, config)
    yield from weights(folder, checkpoint, budget)


def _quietly(call: Callable[[], T], budget: Budget) -> tuple[T, list[str]]:
    """The result of a call, and the lines that it printed."""
    said = io.StringIO()
    with redirect_stdout(said):
        found = budget.within(call)
    return found, [line for line in said.getvalue().split("\n") if line]


def going_on(folder: Path, config: DictConfig) -> Iterator[Finding]:
    """Check what an unfinished run needs: disk space, permissions and its data."""
    if not os.access(folder, os.W_OK):
        yield problem("its folder cannot be written to", "change its rights")
    files = [path / STATE for _, path in Run(folder).checkpoints()]
    sizes = [file.stat().st_size for file in files if file.exists()]
    free = shutil.disk_usage(folder).free
    if sizes and free < max(sizes):
        need = f"{max(sizes) / 2**20:,.0f} MiB"
        yield problem(f"a checkpoint has {need}, and {free / 2**20:,.0f} MiB are free", "make room")
    data = config.data.get("path")
    if isinstance(data, str) and not matching(data):
        yield problem(f"its data, {data}, is not there", "put it back, or ask elsewhere")
    pictures = (config.data.get("pictures") or {}).get("sizes") or []
    batches = 2 * config.get("workers", 0)  # prefetched, in shared memory
    need = batches * config.batch * sum(12 * size**2 for size in pictures)
    if Path("/dev/shm").exists() and need > (room := shutil.disk_usage("/dev/shm").free):
        yield problem(
            f"its {config.workers} workers need {need / 2**20:,.0f} MiB of shared memory, and "
            f"/dev/shm has {room / 2**20:,.0f}",
            "give the container more (docker run --shm-size=...), or choose fewer workers=...",
        )


def weights(folder: Path, checkpoint: Checkpoint | None, budget: Budget) -> Iterator[Finding]:
    """Check that the weights fit the configuration, its encoders and the newest checkpoint."""
    if Run(folder).config.get("adapter"):
        names = ", ".join(file.name for file in Run(folder).weights) or "nothing yet"
        yield note(f"it holds {names}, an addition to {Run(folder).config.start}")
        return
    module = _unloaded(folder)
    if not checkpoint and not Run(folder).weights:
        yield note("it has no weights yet")
        return
    try:
        for line in _quietly(lambda: module.restore(folder), budget)[1]:
            yield note(line.removeprefix(f"{folder}: "))
        for encoder in module.frozen:
            if encoder.hash:
                yield note(f"it was trained with the encoder {encoder.name} ({encoder.hash})")
        if checkpoint and isinstance(module, Stage):
            yield from budget.within(lambda: list(_average(folder, checkpoint)))
    except UserError as error:
        yield told(error)
    except TimeoutError:
        yield note(f"its encoders or weights were not hashed: they are large, so {_SLOW}")


def _average(folder: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check that the exported weights are finite, and equal the checkpoint's average."""
    saved = torch.load(checkpoint.path / STATE, map_location="cpu", weights_only=True, mmap=True)
    if saved["position"]["images"] != Run(folder).status().get("images"):
        return  # killed after it exported the weights, and before it saved the checkpoint
    expected = {**saved["state_dict"], **saved["callbacks"]["EMA"]["average"]}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            ours = file.get_tensor(key)
            if ours.is_floating_point() and not ours.isfinite().all():
                yield problem(f"{WEIGHTS}: {key} has numbers that are not finite", _GONE)
                return
            if not torch.equal(ours, expected[key].to(ours.dtype)):
                yield problem(
                    f"{WEIGHTS} is not the average of {checkpoint.path.name}: {key} differs", _GONE
                )
                return
    yield note(f"{WEIGHTS} is the average of {checkpoint.path.name}")
