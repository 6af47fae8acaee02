"""Decide whether a task is finished, from the file `done` that it writes into its folder.

A task writes `done` itself, after its last output: the attempt, and the size and a hash of each
output. `done` counts only while it agrees with the outputs on disk. Exit codes can prove failure
but not success: srun exits with 0 when a node is lost.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cascade.errors import Superseded
from cascade.files.atomic import write_text
from cascade.files.process import attempt, is_first_rank
from cascade.runs.run import Run

DONE = "done"
FROZEN = "frozen.yaml"  # the configuration that the command of a task reads
ATTEMPT = "attempt"  # the number of the newest attempt, and the launcher's own counters
FAILURE = "failure.txt"  # one line: why the last attempt failed; removed by the next attempt
_END = 2**16  # bytes


def begin(folder: Path) -> int:
    """Start an attempt: remove what the last one reported. Returns the attempt's number."""
    for name in (DONE, FAILURE):
        (folder / name).unlink(missing_ok=True)
    number = newest_attempt(folder) + 1
    write_text(folder / ATTEMPT, f"{number} 0 \n")
    return number


def newest_attempt(folder: Path) -> int:
    """The number of the newest attempt in a folder; 0 if there is none."""
    try:
        return int((folder / ATTEMPT).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def finish(outputs: Iterable[Path]) -> None:
    """Write `done` where this process's launcher looks for it; do nothing without a launcher.

    Raises:
        Superseded: there is a newer attempt.
    """
    own = attempt()
    if own is None or not is_first_rank():
        return
    folder = Path(os.environ["CASCADE_FOLDER"])
    if (newest := newest_attempt(folder)) != own:
        raise Superseded(f"{folder}: attempt {newest} has taken over from this one ({own})")
    images = Run(folder).status().get("images")
    marks = {os.path.relpath(path, folder): _mark(path) for path in outputs}
    about = {"attempt": own, "images": images, "outputs": marks}
    write_text(folder / DONE, json.dumps(about) + "\n")


def finished(
    folder: Path, images: int | None = None, there: Callable[[], bool] = lambda: True
) -> bool:
    """Whether a task succeeded and its outputs are still intact.

    Trainings are judged by their status, so that those without a launcher count too. Older versions
    left an empty `done`, which lists no outputs; `there` checks for them.

    Args:
        images: how many a training must have seen; None: its own total.
        there: whether the outputs that `done` does not list exist.
    """
    run, mark = Run(folder), folder / DONE
    status = run.status()
    if status or any(map(_is_training, (folder / FROZEN, run.config_file))):
        total = images or status.get("total")
        if total is None or status.get("images", 0) < total or not run.weights:
            return False
    elif not mark.exists():
        return False
    return _agrees(folder, mark) and there()


def _agrees(folder: Path, mark: Path) -> bool:
    if not mark.exists() or not mark.stat().st_size:
        return True
    try:
        about = json.loads(mark.read_text())
        if about.get("attempt") not in (None, newest_attempt(folder)):
            return False
        return all(_mark(folder / name) == own for name, own in about["outputs"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _mark(path: Path) -> dict[str, Any]:
    """Size of a file and a hash of its first and last 64 KiB: weights have gigabytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END))
        file.seek(max(_END, size - _END))
        digest.update(file.read(_END))
    return {"bytes": size, "sha256 of its ends": digest.hexdigest()}


def _is_training(config: Path) -> bool:
    try:
        return bool(re.search("^images:", config.read_text(), re.MULTILINE))
    except (OSError, ValueError):
        return False
