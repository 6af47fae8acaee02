"""The state of a run, read from its directory and Slurm's queue without importing torch.

`status.json` is as recent as the last checkpoint, `metrics.csv` as the last few steps. Heartbeats
show that a process is alive, `events.jsonl` how the last one ended.
"""

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cascade.errors import UserError
from cascade.formats.texts import lines
from cascade.runs.done import FAILURE, FROZEN, finished
from cascade.runs.run import (
    CHECKPOINTS,
    CONFIG,
    HEARTBEATS,
    MLFLOW,
    SAMPLES,
    TENSORBOARD,
    WANDB,
    Run,
    read_yaml,
)
from cascade.slurm.plan import LOG
from cascade.slurm.queue import Job, known_jobs, locked

_MARKS = {CONFIG, FROZEN, LOG}  # a folder with any of these is a run
_SKIPPED = {CHECKPOINTS, SAMPLES, TENSORBOARD, WANDB, MLFLOW, HEARTBEATS, "launch", "drill"}
_SILENT = 60.0  # seconds after which a run is presumed dead; it has a heartbeat every 10
_TAIL = 4096  # bytes
_WORKING = ("running", "requeued", "preempted")
_COLORS = {"running": "cyan", "finished": "green", "failed": "red", "preempted": "yellow"}


@dataclass(frozen=True)
class State:
    """The current state of a run.

    Args:
        word: queued, running, preempted, requeued, finished, failed, stopped or not started.
        images: images seen, if known.
        total: images of the whole training, if known.
        rate: images per second, from the last row of metrics.
        note: the job, what it waits for, or why it failed.
    """

    word: str
    images: int | None = None
    total: int | None = None
    rate: float | None = None
    loss: float | None = None
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """Remaining training time at the last rate; None if unknown or not running."""
        if self.word not in _WORKING or None in (self.images, self.total) or not self.rate:
            return None
        return max(0, self.total - self.images) / self.rate


def runs(folder: Path) -> Iterator[Path]:
    """Yield all run directories in a folder, including itself, in order."""
    for path, folders, files in os.walk(folder):
        if not _MARKS.isdisjoint([*folders, *files]):
            yield Path(path)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _SKIPPED)


def state(folder: Path, job: Job | None) -> State:
    """Return the state of a run; `job` is its job in Slurm's queue, if any."""
    run = Run(folder)
    row, status = _last_row(run.metrics_file), run.status()
    total = status.get("total") or _planned(folder)
    images = max(int(row.get("images", 0)), status.get("images", 0)) if total else None
    rate, loss = (float(row[key]) if row else None for key in ("images_per_second", "loss"))
    word, note = _word(folder, job)
    return State(word, images, total, rate, loss, note)


def _word(folder: Path, job: Job | None) -> tuple[str, str]:
    last = _last_event(folder)
    if job and job.state != "PENDING":
        again = f", restart {job.restarts}" if job.restarts else ""
        return "running", f"{job}{again}"
    if job:
        waits = f"{job}: {job.reason}"
        if not job.restarts:
            return "queued", waits
        return ("preempted" if last.get("signal") == "SIGTERM" else "requeued"), waits
    if locked(folder):
        return "running", "on this machine"
    if (folder / FAILURE).exists():
        return "failed", (folder / FAILURE).read_text().strip()
    if finished(folder):
        return "finished", ""
    if time.time() - (Run(folder).last_heartbeat() or 0) < _SILENT:
        return "running", ""
    if not (folder / CONFIG).exists() and not (folder / LOG).exists():
        return "not started", ""
    return "stopped", f"by {last['signal']}" if "signal" in last else ""


def _planned(folder: Path) -> int | None:
    for name in (FROZEN, CONFIG):
        try:
            return int(read_yaml(folder / name)["images"])
        except (ValueError, TypeError, KeyError):  # missing, or damaged
            continue
    return None


def tail(path: Path) -> list[str]:
    """Return the last complete lines of a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return lines(file.read().decode(errors="replace").rpartition("\n")[0])
    except OSError:
        return []


def _last_row(path: Path) -> dict[str, str]:
    last = tail(path)
    try:
        with path.open() as file:
            names = next(csv.reader(file))
    except (OSError, StopIteration):
        return {}
    row = dict(zip(names, last[-1].split(","))) if last else {}
    return row if row.keys() == set(names) and row["images"].isdigit() else {}


def _last_event(folder: Path) -> dict:
    for line in reversed(tail(Run(folder).events)):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def table(states: Mapping[str, State]) -> Table:
    """Return a printable table of states by name."""
    out = Table("run", "state", "images", "of", "images/s", "loss", "left", "", box=None)
    for column in out.columns[2:7]:
        column.justify = "right"
    for name, one in states.items():
        color = _COLORS.get(one.word, "")
        word = f"[{color}]{one.word}[/]" if color else one.word
        out.add_row(escape(name), word, *_figures(one), escape(one.note))
    return out


def screen(stderr: bool = False) -> Console:
    """Return a console that does not truncate tables when the output is not a terminal."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 200
    return console


def _figures(one: State) -> Iterable[str]:
    yield "" if one.images is None else f"{one.images:,}"
    yield "" if one.total is None else f"{one.total:,}"
    yield "" if one.rate is None else f"{one.rate:,.1f}"
    yield "" if one.loss is None else f"{one.loss:.4g}"
    yield "" if one.seconds_left is None else duration(one.seconds_left)


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: "3 d 4 h", "12 min 5 s"."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    words, rest = [], round(seconds)
    first = next((i for i, (_, size) in enumerate(units) if rest >= size), len(units) - 1)
    for unit, size in units[first : first + 2]:
        count, rest = divmod(rest, size)
        words.append(f"{count} {unit}")
    return " ".join(words)


def found_states(roots: Sequence[Path]) -> dict[str, State]:
    """Return the states of all runs in some folders, including those that only Slurm knows of.

    Raises:
        UserError: a root is not a folder.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: give a folder that contains runs")
    jobs = known_jobs()
    folders = {folder for root in roots for folder in runs(root)}
    folders |= {folder for folder in jobs for root in roots if folder.is_relative_to(root)}
    return states(sorted(folders), jobs, Path.cwd())


def states(folders: Sequence[Path], jobs: Mapping[Path, Job], root: Path) -> dict[str, State]:
    """Return the states of runs by name: the path relative to `root`, if inside it."""
    out, root = {}, root.absolute()
    for path in (folder.absolute() for folder in folders):
        inside = path != root and path.is_relative_to(root)
        out[str(path.relative_to(root) if inside else path)] = state(path, jobs.get(path))
    return out
