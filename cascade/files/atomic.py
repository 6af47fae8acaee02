"""Atomic writes: a file or folder appears complete, or not at all.

It is written under a hidden name in the same folder, flushed to disk and renamed. A killed
writer leaves temporary files, whose names end in `REST`.
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
    """Within the context, call `check` before each rename into a folder; it raises to refuse it."""
    fence = (folder.absolute(), check)
    _fences.append(fence)
    try:
        yield
    finally:
        _fences.remove(fence)


def matching(pattern: str | Path) -> list[Path]:
    """The files that match a glob, sorted; an existing path is never treated as a glob."""
    names = [pattern] if os.path.lexists(pattern) else glob.glob(str(pattern))
    return sorted(map(Path, names))


def check_writable(folder: Path, instead: str = "choose another place") -> None:
    """Check that a folder is writable, before any work is done.

    A file is created and removed in the folder, or in its nearest existing parent.

    Args:
        instead: the remedy that the message names.

    Raises:
        UserError: it is not writable.
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
    """The path NAME.ending next to a file or folder NAME; "." and ".." are resolved first."""
    named = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return named.with_name(f"{named.name}{ending}")


def check_apart(place: Path, source: Path, instead: str) -> None:
    """Raise UserError if a place to write to lies inside a folder that is read."""
    if source.is_dir() and place.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{place} lies in {source}, which is only read: {instead}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or folder under a temporary name, flush it to disk and rename it to `path`.

    Args:
        write: is called with the temporary path, and creates a file or a folder of files there. A
            folder must not exist yet at `path`.

    Raises:
        OSError: the write failed, as on a full disk. `path` is as it was before.
        Superseded: another process has taken over the folder (`fenced`). Likewise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines that share the disk may write to one path at the same time.
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


def write_text(path: Path, text: str) -> None:
    """Write a file of text; raises as `write_atomically` does."""
    write_atomically(path, lambda beside: beside.write_text(text))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_rests(folder: Path) -> None:
    """Remove what killed writers left in a folder. No other process may be writing there."""
    for rest in folder.glob(f".*{REST}"):
        remove(rest)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot flush a folder; they keep renames in order anyway.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
