"""When a task is finished: what `done` in its folder says, and what lies there.

A task writes `done` itself, behind its last output: its attempt, and of each output the size and a
hash. It is believed as long as that agrees with what lies there. An exit code can show that a task
failed, and never that it ended well: srun ends with 0 when a node is lost.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cascade.errors import Superseded
from cascade.files import write_atomically

DONE = "done"
ATTEMPT = "attempt"  # the number of the newest attempt, and what its launcher counts beside
FAILURE = "failure.txt"  # why the last attempt failed, in a line; removed by the next
STATUS = "status.json"  # of a training: images seen, and in all
_CONFIGS = ("frozen.yaml", "config.yaml")
_END = 2**16  # bytes


def attempt() -> int | None:
    """The number of this process's attempt; None if no launcher started it."""
    return int(os.environ.get("CASCADE_ATTEMPT") or 0) or None


def is_first_rank() -> bool:
    """Of the processes that srun, torchrun or Lightning has started together."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def begin(folder: Path) -> int:
    """Begins an attempt: what is left of the one before is no longer true. Returns its number."""
    for name in (DONE, FAILURE):
        (folder / name).unlink(missing_ok=True)
    number = newest_attempt(folder) + 1
    write_atomically(folder / ATTEMPT, lambda path: path.write_text(f"{number} 0 \n"))
    return number


def newest_attempt(folder: Path) -> int:
    try:
        return int((folder / ATTEMPT).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def finish(outputs: Iterable[Path]) -> None:
    """Writes `done` where the launcher of this process looks for it, if there is one.

    Raises:
        Superseded: there is a newer attempt.
    """
    own = attempt()
    if own is None or not is_first_rank():
        return
    folder = Path(os.environ["CASCADE_FOLDER"])
    if (newest := newest_attempt(folder)) != own:
        raise Superseded(f"{folder}: attempt {newest} has taken over from this one ({own})")
    images = _read(folder / STATUS).get("images")
    marks = {os.path.relpath(path, folder): _mark(path) for path in outputs}
    text = json.dumps({"attempt": own, "images": images, "outputs": marks}) + "\n"
    write_atomically(folder / DONE, lambda path: path.write_text(text))


def finished(
    folder: Path, images: int | None = None, there: Callable[[], bool] = lambda: True
) -> bool:
    """Whether a task has ended well, and what it made is still there.

    A training is judged by its own status, so one that no launcher started is judged as well. Older
    versions left an empty `done`, which says nothing: `there` tells what must be there.

    Args:
        images: which a training must have seen; None: all that it was to see.
        there: whether outputs are there that `done` does not list.
    """
    mark, status = folder / DONE, _read(folder / STATUS)
    if status or any(map(_is_training, (folder / name for name in _CONFIGS))):
        total = images or status.get("total")
        if total is None or status.get("images", 0) < total:
            return False
        if not any(folder.glob("*.safetensors")):
            return False
    elif not mark.exists():
        return False
    return _agrees(folder, mark) and there()


def _agrees(folder: Path, mark: Path) -> bool:
    if not mark.exists() or not mark.stat().st_size:
        return True
    about = _read(mark)
    if about.get("attempt") not in (None, newest_attempt(folder)):
        return False
    try:
        return all(_mark(folder / name) == own for name, own in about["outputs"].items())
    except (OSError, KeyError, AttributeError):
        return False


def _mark(path: Path) -> dict[str, Any]:
    """Size and hash of a file, or of its two ends: weights have gigabytes."""
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


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
