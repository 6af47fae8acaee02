"""Which checks to run: those of the installation and the machine, and those that suit each path.

Checks that read data or models import torch, so they are imported when they run: the others must
run on a broken installation.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from cascade.data.tars.tar import tars_of
from cascade.doctor import installation, machine, probe
from cascade.doctor.finding import Budget, Finding, problem, told
from cascade.errors import UserError
from cascade.files.stores.places import Place, Remote
from cascade.formats.kinds import kind_of
from cascade.runs.run import CASCADE

READING = 8.0  # seconds that reading may take without --full

_ENCODERS = ("open_clip_config.json", "config.json")  # of a CLIP, of a T5
_ENDINGS = (".tar", ".yaml")  # of files that may be given instead of a folder
_GIVE = "give a folder of shards, a run, a model, or an encoder"

Subject = tuple[str, Callable[[], Iterable[Finding]]]


def subjects(
    paths: Iterable[Place], full: bool, answer: Callable[[], dict | str | None]
) -> Iterator[Subject]:
    """The checks to run, with the name of what they check.

    Args:
        answer: waits for the result of `probe`.
    """
    paths, budget = list(paths), Budget(None if full else READING)
    disks = [path for path in paths if isinstance(path, Path)] or [Path()]
    yield "installation", installation.packages
    yield "machine", lambda: [*machine.machine(os.environ), *machine.disks(disks)]
    for path in paths:
        yield from _subjects_of(path, full, budget)
    yield "imports", lambda: probe.imports(answer())


def _subjects_of(path: Place, full: bool, budget: Budget) -> Iterator[Subject]:
    """The checks of one path, which may be a run and a cascade at once; in a store, of shards."""
    if isinstance(path, Remote):
        yield f"data {path}", partial(_check, "data", "data", path, full, budget)
        return
    if not path.is_dir() and (wrong := list(_file(path))):
        yield str(path), lambda: wrong
        return
    if path.is_dir():
        yield f"disk of {path}", partial(machine.locks, path)
    found = list(_parts(path, full, budget))
    nothing = problem("there is nothing here that can be checked", _GIVE)
    yield from found or [(str(path), lambda: [nothing])]


def _file(path: Path) -> Iterator[Finding]:
    """A problem if the path is a file of a kind that cannot be checked."""
    try:
        kind = kind_of(path)
    except OSError as error:
        yield problem(f"cannot be read: {error.strerror}", _GIVE)
        return
    if kind or path.suffix not in _ENDINGS:
        yield problem(f"this is {kind or 'a single file'}", _GIVE)


def _parts(path: Path, full: bool, budget: Budget) -> Iterator[Subject]:
    try:
        tars = tars_of(path) if path.is_dir() else [path] if path.suffix == ".tar" else []
        from cascade.slurm.state import runs
    except (UserError, ImportError) as error:
        wrong = told(error)
        yield str(path), lambda: [wrong]
        return
    if tars:
        yield f"data {path}", partial(_check, "data", "data", path, full, budget)
        return
    file = path / CASCADE if path.is_dir() else path
    if file.is_file():
        yield f"model {file}", partial(_check, "model", "model", file)
    if any((path / name).is_file() for name in _ENCODERS):
        yield f"encoder {path}", partial(_check, "encoder", "encoder", path, budget)
    for run in runs(file.parent):
        yield f"run {run}", partial(_check, "model", "run", run, budget)


def _check(module: str, name: str, *about: Any) -> Iterable[Finding]:
    """The findings of a check, whose module is imported only now."""
    return getattr(import_module(f"cascade.doctor.{module}"), name)(*about)
