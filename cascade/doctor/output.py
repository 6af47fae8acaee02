"""Format findings: as text for a terminal, and as JSON."""

import getpass
import json
import platform
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cascade.doctor import installation
from cascade.doctor.finding import Finding

_SHOWN = {"note": "ok", "warning": "warning", "problem": "PROBLEM"}


def text(name: str, findings: Iterable[Finding]) -> str:
    """Format the findings about one subject for the terminal."""
    width = max(60, min(100, shutil.get_terminal_size((100, 0)).columns))
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    lines, deep, deeper = [name], " " * 11, " " * 14
    for finding in findings:
        first = f"  {_SHOWN[finding.level]:<8} "
        lines += wrap(finding.what, initial_indent=first, subsequent_indent=deep)
        if finding.remedy:
            lines += wrap(finding.remedy, initial_indent=f"{deep}-> ", subsequent_indent=deeper)
    return "\n".join(lines)


def as_json(found: Iterable[tuple[str, list[Finding]]], counts: Counter[str]) -> str:
    """All findings as JSON, without the names of the user and the machine, to be shared."""
    findings = [{"subject": name, **vars(finding)} for name, of in found for finding in of]
    about = {
        "versions": installation.versions(),
        "findings": findings,
        "problems": counts["problem"],
        "warnings": counts["warning"],
    }
    return nameless(json.dumps(about, indent=2, ensure_ascii=False))


def nameless(words: str) -> str:
    """Remove the home directory, the user's name and the machine's name from a text."""
    words = words.replace(f"{Path.home()}/", "~/").replace(f'{Path.home()}"', '~"')
    for name, stands in ((_user(), "USER"), (platform.node(), "HOST")):
        if name:
            words = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", stands, words)
    return words


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container, the user may have no name
        return ""
