"""Files and folders that are whole or not there.

They are written under a hidden name beside their place, flushed to disk and renamed. What a killed
writer leaves ends in `REST`.
"""

import errno
import glob
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cascade.errors import UserError

REST = ".part"
_fences: list[tuple[Path, Callable[[], None]]] = []


@contextmanager
def fenced(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` before anything is renamed into place in a folder: it raises if it must not."""
    fence = (folder.absolute(), check)
    _fences.append(fence)
    try:
        yield
    finally:
        _fences.remove(fence)


def matching(pattern: str | Path) -> list[Path]:
    """The files that a glob leads to, by name; what is there is never taken for a glob."""
    names = [pattern] if os.path.lexists(pattern) else glob.glob(str(pattern))
    return sorted(map(Path, names))


def check_writable(folder: Path, instead: str = "choose another place") -> None:
    """Asks whether files can be written into a folder, before any work is done for them.

    A file is made and removed in the folder, or in what is there of the path to it. Nothing stays.

    Args:
        instead: what to do otherwise, for the message.

    Raises:
        UserError: they cannot.
    """
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    probe = there / f".{platform.node()}.{os.getpid()}{REST}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write to {folder} ({there}: {why}): {instead}") from error


def beside(path: Path, ending: str) -> Path:
    """The place NAME.ending beside a file or folder; "." and ".." have their real NAME."""
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return named.with_name(f"{named.name}{ending}")


def check_apart(place: Path, source: Path, instead: str) -> None:
    """Raises UserError if a place to write to lies inside a folder that is read."""
    if source.is_dir() and place.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{place} lies in {source}, which is read and stays as it is: {instead}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a place beside `path`, flushes what it made there and renames it to `path`.

    Args:
        write: makes a file, or a folder of files. A folder replaces no other.

    Raises:
        OSError: the disk is full, or refuses for another reason; nothing is left but what was
            there before.
        Superseded: another process has taken over the folder (`fenced`); likewise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several machines may share the disk, and write to one place at a time.
    beside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}{REST}")
    try:
        write(beside)
        for part in [*(beside.iterdir() if beside.is_dir() else ()), beside]:
            _flush(part)
        for folder, check in _fences:
            if path.absolute().is_relative_to(folder):
                check()
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        remove(beside)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_rests(folder: Path) -> None:
    """Removes what killed writers left in a folder that nobody writes to now."""
    for rest in folder.glob(f".*{REST}"):
        remove(rest)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot flush a folder, and need not: their renames are in order.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
