"""A folder of pieces of remote files, shared by all processes of a node, with a size limit.

A piece is `PIECE` bytes of one version of a file, followed by a checksum of each `BLOCK` bytes,
which every read compares: a damaged piece is removed and fetched again. The pieces that were not
read for longest are removed first; one that is being read is locked, and stays.
"""

import errno
import fcntl
import hashlib
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cascade.files.atomic import REST
from cascade.files.locks import NO_LOCKS

PIECE = 4 * 2**20
BLOCK = 2**14
GB = 32.0  # the usual limit
FEW = 4  # pieces that a cache must hold to be used
TOUCH = 60.0  # seconds between two notes that a piece is in use
_SUM = 4  # bytes of a checksum


def folder() -> Path:
    """Return the cache's folder: $CASCADE_CACHE, or one of this user's in the temporary folder."""
    return Path(
        os.environ.get("CASCADE_CACHE")
        or Path(tempfile.gettempdir()) / f"cascade-cache-{os.getuid()}"
    )


def key_of(url: str, size: int, mtime_ns: int, version: str) -> str:
    """Return the name under which the pieces of one version of a file are kept."""
    return hashlib.sha256(f"{url}\n{size}\n{version or mtime_ns}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Cache:
    """The pieces in a folder, of at most `limit` bytes together; 0: nothing is kept."""

    folder: Path
    limit: int

    @classmethod
    def of(cls, gb: float | int) -> "Cache":
        limit = int(gb * 1e9)
        return cls(folder(), limit if limit >= FEW * PIECE else 0)

    def path(self, key: str, number: int) -> Path:
        return self.folder / key / f"{number:06d}"

    def read(self, key: str, number: int, length: int, start: int, end: int) -> bytes | None:
        """Return bytes `start` to `end` of a piece of `length` bytes; None if it is not there."""
        path = f"{self.folder}/{key}/{number:06d}"  # as `path`, which takes longer
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            _locked(file, fcntl.LOCK_SH)
            stat = os.fstat(file)
            found = self._checked(file, stat.st_size, key, number, length, start, end)
            if found is not None and time.time() - stat.st_mtime > TOUCH:
                os.utime(file)
        except OSError:  # a broken disk
            found = None
        finally:
            os.close(file)
        if found is None:
            with suppress(OSError):
                os.unlink(path)
        return found

    def _checked(
        self, file: int, size: int, key: str, number: int, length: int, start: int, end: int
    ) -> bytes | None:
        if size != length + _SUM * -(-length // BLOCK):
            return None
        first, last = start // BLOCK, -(-end // BLOCK)
        data = os.pread(file, min(last * BLOCK, length) - first * BLOCK, first * BLOCK)
        sums = os.pread(file, _SUM * (last - first), length + _SUM * first)
        if sums != _sums(data, key, number, first):
            return None
        return data[start - first * BLOCK : end - first * BLOCK]

    def write(self, key: str, number: int, data: bytes | memoryview) -> None:
        """Write a piece; it appears whole. Raises OSError: the disk is full or broken."""
        path = self.path(key, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}{REST}")
        try:
            with open(beside, "wb", buffering=0) as file:
                for part in (memoryview(data), _sums(data, key, number, 0)):
                    if file.write(part) != len(part):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.replace(beside, path)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Create the folder, for this user alone. Raises OSError: it is another user's."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "the folder is another user's", str(self.folder))

    def evict(self, room: int) -> int:
        """Remove the oldest pieces until `room` bytes are free; return how many are taken.

        Also removes what killed writers left an hour ago.
        """
        rows, now = [], time.time()
        for path in self.folder.glob("*/*"):
            with suppress(OSError):
                stat = path.stat()
                if not path.name.endswith(REST):
                    rows.append((stat.st_mtime, stat.st_size, path))
                elif now - stat.st_mtime > 3600:
                    path.unlink()
        taken = sum(size for _, size, _ in rows)
        for _, size, path in sorted(rows):
            if taken + room <= self.limit:
                break
            with suppress(OSError), _unread(path):
                path.unlink()
                taken -= size
                with suppress(OSError):
                    path.parent.rmdir()  # if it was the last one
        return taken


@contextmanager
def _unread(path: Path) -> Iterator[None]:
    """Raises BlockingIOError if somebody reads the file."""
    file = os.open(path, os.O_RDONLY)
    try:
        _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _locked(file: int, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _sums(data: bytes | memoryview, key: str, number: int, first: int) -> bytes:
    """Return the checksums of blocks `first`, `first` + 1, ..., which know their place."""
    view, seed = memoryview(data), zlib.crc32(f"{key} {number}".encode())
    sums = [
        zlib.crc32(view[start : start + BLOCK], seed ^ (first + start // BLOCK))
        for start in range(0, len(view), BLOCK)
    ]
    return struct.pack(f"<{len(sums)}I", *sums)
