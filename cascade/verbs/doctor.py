"""`cascade doctor`: what is wrong with the installation, with shards, runs, models or encoders.

It has to run where the installation is broken: at its top it imports the standard library, and what
imports no more.
"""

import argparse
import getpass
import json
import os
import platform
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from cascade.data.tar import tars_of
from cascade.doctor import installation, machine, probe
from cascade.doctor.finding import Budget, Finding, guarded, problem, some, told
from cascade.errors import UserError
from cascade.kinds import kind_of

READING, IMPORTING = 8.0, 15.0  # seconds, without --full
ANY = 600.0  # seconds of imports, with it

_CASCADE = "cascade.yaml"
_ENCODERS = ("open_clip_config.json", "config.json")  # a CLIP's or a T5's
_ENDINGS = (".tar", ".yaml")  # of files that may be given by themselves
_GIVE = "give a folder of shards, a run, a model, or an encoder"
_SHOWN = {"note": "ok", "warning": "warning", "problem": "PROBLEM"}

Subject = tuple[str, Callable[[], Iterable[Finding]]]


def main(args: argparse.Namespace) -> None:
    """Prints the findings. Raises UserError if one of them is a problem."""
    process = probe.started(probe.MODULES if args.full else probe.MODULES[:1])
    answer = partial(probe.answer, process, ANY if args.full else IMPORTING)
    found, out = [], sys.stdout
    with redirect_stdout(sys.stderr):  # where a check that took too long may still print
        for name, check in subjects([Path(p) for p in args.paths], args.full, answer):
            found.append((name, list(guarded(check))))
            if not args.json:
                print(text(*found[-1]), flush=True, file=out)
    counts = Counter(finding.level for _, of in found for finding in of)
    if args.json:
        print(as_json(found, counts), flush=True)
    said = ", ".join(some(counts[level], level) for level in ("problem", "warning"))
    if counts["problem"]:
        raise UserError(said)
    if not args.json:
        print(said)


def subjects(
    paths: Iterable[Path], full: bool, answer: Callable[[], dict | str | None]
) -> Iterator[Subject]:
    """What is to be checked, by name.

    Args:
        answer: waits for what `probe` saw.
    """
    paths, budget = list(paths), Budget(None if full else READING)
    yield "installation", installation.packages
    yield "machine", lambda: [*machine.machine(os.environ), *machine.disks(paths or [Path()])]
    for path in paths:
        yield from _subjects_of(path, full, budget)
    yield "imports", lambda: probe.imports(answer())


def _subjects_of(path: Path, full: bool, budget: Budget) -> Iterator[Subject]:
    """Of one path: all that it is."""
    if not path.is_dir() and (wrong := list(_file(path))):
        yield str(path), lambda: wrong
        return
    if path.is_dir():
        yield f"disk of {path}", partial(machine.locks, path)
    found = list(_parts(path, full, budget))
    nothing = problem("there is nothing here that can be checked", _GIVE)
    yield from found or [(str(path), lambda: [nothing])]


def _file(path: Path) -> Iterator[Finding]:
    """What is wrong with giving a file; nothing if it may be given."""
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
        yield f"data {path}", partial(_data, path, full, budget)
        return
    file = path / _CASCADE if path.is_dir() else path
    if file.is_file():
        yield f"model {file}", partial(_model, file)
    if any((path / name).is_file() for name in _ENCODERS):
        yield f"encoder {path}", partial(_encoder, path, budget)
    for run in runs(file.parent):
        yield f"run {run}", partial(_run, run, budget)


def _data(path: Path, full: bool, budget: Budget) -> Iterator[Finding]:
    from cascade.doctor.data import data

    return data(path, full, budget)


def _model(file: Path) -> Iterator[Finding]:
    from cascade.doctor.model import model

    return model(file)


def _encoder(folder: Path, budget: Budget) -> Iterator[Finding]:
    from cascade.doctor.encoder import encoder

    return encoder(folder, budget)


def _run(folder: Path, budget: Budget) -> Iterator[Finding]:
    from cascade.doctor.model import run

    return run(folder, budget)


def text(name: str, findings: Iterable[Finding]) -> str:
    """A subject and what was found, for people."""
    width = max(60, min(100, shutil.get_terminal_size((100, 0)).columns))
    lines = [name]
    for finding in findings:
        first = f"  {_SHOWN[finding.level]:<8} "
        lines += _wrapped(finding.what, width, first, " " * len(first))
        if finding.remedy:
            lines += _wrapped(finding.remedy, width, f"{' ' * 11}-> ", " " * 14)
    return "\n".join(lines)


def _wrapped(words: str, width: int, first: str, then: str) -> list[str]:
    return textwrap.wrap(
        words,
        width,
        initial_indent=first,
        subsequent_indent=then,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(found: Iterable[tuple[str, list[Finding]]], counts: Counter[str]) -> str:
    """All of it for machines, and for those who help: it names no user and no machine."""
    findings = [{"subject": name, **vars(finding)} for name, of in found for finding in of]
    about = {
        "versions": installation.versions(),
        "findings": findings,
        "problems": counts["problem"],
        "warnings": counts["warning"],
    }
    return nameless(json.dumps(about, indent=2, ensure_ascii=False))


def nameless(words: str) -> str:
    """Words without the home directory, the user's name in a path, and the machine's name."""
    words = words.replace(f"{Path.home()}/", "~/").replace(f'{Path.home()}"', '~"')
    for name, stands in ((_user(), "USER"), (platform.node(), "HOST")):
        if name:
            words = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", stands, words)
    return words


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return ""
