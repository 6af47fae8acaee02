"""Trainings, from their directories alone: how far they are, their losses, their newest grids."""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.runs.run import Run
from cascade.serve.comparing import grids
from cascade.slurm.queue import Job, known_jobs
from cascade.slurm.state import State, duration, runs, state

FRESH, ASKED = 2.0, 60.0  # seconds for which runs, and Slurm's queue, are not read again
POINTS = 240  # of a curve


@dataclass(frozen=True)
class Training:
    """A run, and how far it is."""

    name: str
    path: Path
    state: State

    def row(self) -> list[str]:
        """For a table with the columns of `COLUMNS`."""
        of = self.state
        share = f"{of.images:,} of {of.total:,}" if of.images is not None and of.total else ""
        rate = "" if of.rate is None else f"{of.rate:,.1f}"
        loss = "" if of.loss is None else f"{of.loss:.4g}"
        left = "" if of.seconds_left is None else duration(of.seconds_left)
        return [self.name, of.word, share, rate, loss, left, of.note]


COLUMNS = ("Run", "State", "Images", "Images per second", "Loss", "Time left", "Note")


class Trainings:
    """The runs under some folders; many visitors at once cause one look."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = roots
        self._lock = threading.Lock()
        self._at, self._last = -math.inf, dict[str, Training]()
        self._jobs: Mapping[Path, Job] = {}
        self._asked = -math.inf

    def found(self) -> dict[str, Training]:
        """All runs by name; those that train come first."""
        with self._lock:
            if time.monotonic() - self._at > FRESH:
                if time.monotonic() - self._asked > ASKED:
                    self._jobs, self._asked = known_jobs(), time.monotonic()
                folders = [folder for root in self.roots if root.is_dir() for folder in runs(root)]
                every = [
                    Training(str(path), path, state(path, self._jobs.get(path.absolute())))
                    for path in dict.fromkeys(folders)
                ]
                every.sort(key=lambda one: (one.state.word != "running", one.name))
                self._last = {one.name: one for one in every}
                self._at = time.monotonic()
            return self._last


def losses(run: Path) -> list[tuple[float, float]]:
    """Images and loss of a training, thinned to `POINTS`; what is no number is left out."""
    found = []
    for row in Run(run).metrics():
        try:
            at = float(row["images"]), float(row["loss"])
        except (KeyError, TypeError, ValueError):
            continue
        if all(map(math.isfinite, at)):
            found.append(at)
    step = max(1, math.ceil(len(found) / POINTS))
    return found[::-1][::step][::-1]  # the last one stays


def newest(run: Path, count: int = 2) -> list[tuple[str, bytes]]:
    """The newest grids of a training, newest first, each with the images that were seen by then."""
    found = []
    for path in reversed(grids(run)[-count:]):
        try:
            found.append((f"after {int(path.stem):,} images", path.read_bytes()))
        except OSError:
            continue
    return found
