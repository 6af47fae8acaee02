"""A run, or the runs of a model: whether it can be read, goes on, and is what it was.

Nothing is computed, and no weights are copied: modules are built without memory.
"""

import io
import json
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

from cascade.data.lease import holders
from cascade.doctor.finding import Budget, Finding, note, problem, told, warning
from cascade.done import STATUS
from cascade.errors import UserError
from cascade.files import matching
from cascade.slurm.state import CONFIG, state
from cascade.stage import WEIGHTS, Stage
from cascade.training.checkpoint import FOLDER, STATE, Checkpoint, newest_checkpoint
from cascade.verbs.configuration import loaded
from cascade.verbs.sample import chosen, known
from cascade.verbs.train import untrained
from cascade.verbs.whole import stage_choices, stage_runs

# What `restore` compares is of use here, and not what it copies.
warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")

T = TypeVar("T")

SILENT = 600.0  # seconds: as long as the watchdog lets a step last

_SLOW = "ask again with --full"
_GONE = "train it again, or put the old one back"


def model(file: Path) -> Iterator[Finding]:
    """A `cascade.yaml`: whether its runs are there, and its sampling choices are theirs."""
    stages = stage_choices(file, ())
    yield note(f"stages: {', '.join(stages)}")
    for name, run in stage_runs(file).items():
        if not (run / CONFIG).exists():
            yield problem(f"{name}: {run} is not a run", "train it, or name its folder with `run`")
            continue
        try:
            choices = known(name, stages[name])
            chosen(_unloaded(run), run, **choices)
        except UserError as error:
            yield told(error, f"change what {file.name} says of {name}")


def _unloaded(run: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return untrained(run)


def run(folder: Path, budget: Budget) -> Iterator[Finding]:
    """A run's directory.

    Args:
        budget: of what has to read all of a file.
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
        yield warning(f"it is {now.word}{by}{far}", "the same command again goes on")
    else:
        yield note(f"{now.word}{by}{far}")
    for holder in holders(folder):
        yield note(f"written to by {holder}, who holds its lease")
    if not (folder / CONFIG).exists():
        return
    config = loaded(folder / CONFIG)
    yield from status(folder)
    beats = [path.stat().st_mtime for path in folder.glob("heartbeats/rank*.json")]
    if now.word == "running" and beats and (silent := time.time() - max(beats)) > SILENT:
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


def status(folder: Path) -> Iterator[Finding]:
    """Whether `status.json`, if it is there, can be read."""
    path = folder / STATUS
    try:
        if path.exists() and not {"images", "total"} <= json.loads(path.read_text()).keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):
        yield problem(
            f"{path.name} is damaged, which says how far it is", "remove it, and start it again"
        )


def _quietly(call: Callable[[], T], budget: Budget) -> tuple[T, list[str]]:
    """What a call returns, and the lines that it prints."""
    said = io.StringIO()
    with redirect_stdout(said):
        found = budget.within(call)
    return found, [line for line in said.getvalue().split("\n") if line]


def going_on(folder: Path, config: DictConfig) -> Iterator[Finding]:
    """What a run that is not finished needs: room, rights, and its data."""
    if not os.access(folder, os.W_OK):
        yield problem("its folder cannot be written to", "change its rights")
    sizes = [path.stat().st_size for path in (folder / FOLDER).glob(f"step-*/{STATE}")]
    free = shutil.disk_usage(folder).free
    if sizes and free < max(sizes):
        need = f"{max(sizes) / 2**20:,.0f} MiB"
        yield problem(f"a checkpoint has {need}, and {free / 2**20:,.0f} MiB are free", "make room")
    data = config.data.get("path")
    if isinstance(data, str) and not matching(data):
        yield problem(f"its data, {data}, is not there", "put it back, or ask elsewhere")
    pictures = (config.data.get("pictures") or {}).get("sizes") or []
    batches = 2 * config.get("workers", 0)  # that wait in shared memory
    need = batches * config.batch * sum(12 * size**2 for size in pictures)
    if Path("/dev/shm").exists() and need > (room := shutil.disk_usage("/dev/shm").free):
        yield problem(
            f"its {config.workers} workers need {need / 2**20:,.0f} MiB of shared memory, and "
            f"/dev/shm has {room / 2**20:,.0f}",
            "give the container more (docker run --shm-size=...), or choose fewer workers=...",
        )


def weights(folder: Path, checkpoint: Checkpoint | None, budget: Budget) -> Iterator[Finding]:
    """Whether the weights are of this configuration, these encoders, and this checkpoint."""
    module = _unloaded(folder)
    if not checkpoint and not any(folder.glob("*.safetensors")):
        yield note("it has no weights yet")
        return
    try:
        for line in _quietly(lambda: module.restore(folder), budget)[1]:
            yield note(line.removeprefix(f"{folder}: "))
        for encoder in getattr(module, "encoders", ()):
            if encoder.hash:
                yield note(f"it was trained with the encoder {encoder.name} ({encoder.hash})")
        if checkpoint and isinstance(module, Stage):
            yield from budget.within(lambda: list(_average(folder, checkpoint)))
    except UserError as error:
        yield told(error)
    except TimeoutError:
        yield note(f"its encoders or weights were not hashed: they are large, so {_SLOW}")


def _average(folder: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether the exported weights are finite, and equal the checkpoint's average."""
    saved = torch.load(checkpoint.path / STATE, map_location="cpu", weights_only=True, mmap=True)
    if saved["position"]["images"] != json.loads((folder / STATUS).read_text())["images"]:
        return  # killed behind the weights, and before the checkpoint
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
