"""`cascade doctor`: what is wrong with the installation, with shards, or with a model.

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
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from cascade.doctor import installation, machine, probe
from cascade.doctor.finding import Budget, Finding, guarded, problem, some
from cascade.errors import UserError

READING, IMPORTING = 8.0, 15.0  # seconds, without --full
ANY = 600.0  # seconds of imports, with it

_CASCADE, _CONFIG = "cascade.yaml", "config.yaml"
_SHOWN = {"note": "ok", "warning": "warning", "problem": "PROBLEM"}

Subject = tuple[str, Callable[[], Iterable[Finding]]]


def main(args: argparse.Namespace) -> None:
    """Prints the findings. Raises UserError if one of them is a problem."""
    process = probe.started(probe.MODULES if args.full else probe.MODULES[:1])
    answer = partial(probe.answer, process, ANY if args.full else IMPORTING)
    found = []
    for name, check in subjects([Path(p) for p in args.paths], args.full, answer):
        found.append((name, list(guarded(check))))
        if not args.json:
            print(text(*found[-1]), flush=True)
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
    if not path.exists():
        yield str(path), lambda: [problem("there is no such file or folder", "give one that is")]
        return
    found: list[Subject] = []
    file = path if path.suffix == ".yaml" else path / _CASCADE
    if path.suffix == ".tar" or any(path.glob("*.tar")):
        found += [(f"data {path}", partial(_data, path, full, budget))]
    else:
        found += [(f"model {file}", partial(_model, file))] if file.is_file() else []
        found += [(f"run {run}", partial(_run, run, budget)) for run in _runs(file.parent)]
    if not found:
        nothing = problem("this is neither shards, nor a run, nor a model", "give one of these")
        found = [(str(path), lambda: [nothing])]
    if path.is_dir():
        yield f"disk of {path}", partial(machine.locks, path)
    yield from found


def _runs(path: Path) -> Iterator[Path]:
    """Runs in a folder, itself included, as `cascade demo`, `launch` and `sweep` lay them out."""
    patterns = (_CONFIG, f"*/{_CONFIG}", f"*/*/{_CONFIG}")
    yield from sorted(file.parent for pattern in patterns for file in path.glob(pattern))


def _data(path: Path, full: bool, budget: Budget) -> Iterator[Finding]:
    from cascade.doctor.data import data

    return data(path, full, budget)


def _model(file: Path) -> Iterator[Finding]:
    from cascade.doctor.model import model

    return model(file)


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
