"""Byte ranges of a file, on a disk or in a store; those of stores come by way of the cache."""

import io
import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from cascade.files.stores import client
from cascade.files.stores.cache import GB, PIECE, Cache, key_of
from cascade.files.stores.places import Place, Remote, Stat, stat_of

_AGAIN = 3  # times that a piece which was evicted at once is asked for


@runtime_checkable
class Ranges(Protocol):
    """An open file."""

    stat: Stat

    def pread(self, size: int, offset: int) -> bytes:
        """Return the bytes at an offset, fewer at the end of the file. Raises OSError."""


class LocalRanges:
    """A file on a disk."""

    def __init__(self, path: Place):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (kept open)
        found = os.fstat(self._file.fileno())
        self.stat = Stat(found.st_size, found.st_mtime_ns)

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


class RemoteRanges:
    """One version of an object in a store, read in pieces.

    Raises:
        UserError: it changed or was removed, or the store refuses.
        Unreachable: the store does not answer.
    """

    def __init__(self, where: Remote, cache: Cache):
        self.where, self.cache, self.stat = where, cache, stat_of(where)
        self._key = key_of(where.url, *self.stat)

    def pread(self, size: int, offset: int) -> bytes:
        end = min(offset + size, self.stat.bytes)
        pieces = range(offset // PIECE, -(-end // PIECE))
        spans = ((n, max(offset - n * PIECE, 0), min(end - n * PIECE, PIECE)) for n in pieces)
        return b"".join(self._part(*span) for span in spans if end > offset)

    def _part(self, number: int, start: int, end: int) -> bytes:
        length = min(PIECE, self.stat.bytes - number * PIECE)
        for _ in range(_AGAIN if self.cache.limit else 0):
            found = self.cache.read(self._key, number, length, start, end)
            if found is not None:
                return found
            answer, data = self._ask("piece", number * PIECE + start, number * PIECE + end)
            if not answer.get("kept"):
                return data
        return self._ask("read", number * PIECE + start, number * PIECE + end)[1]

    def _ask(self, do: str, start: int, end: int) -> tuple[dict, bytes]:
        what = {"url": self.where.url, "stat": self.stat, "start": start, "end": end}
        cache = {"cache": str(self.cache.folder), "limit": self.cache.limit}
        try:
            return client.ask(do, **what, **cache)
        except FileNotFoundError as error:
            raise client.Changed(f"{self.where} was removed: put it back") from error


def opened(where: Place, cache: Cache | None = None) -> Ranges:
    """Open a file for reading ranges. Raises OSError as `open` does.

    Args:
        cache: for objects of stores; None: the usual one.
    """
    if isinstance(where, Remote):
        return RemoteRanges(where, cache or Cache.of(GB))
    return LocalRanges(where)


def fetch_ahead(places: Iterable[Place], cache: Cache) -> None:
    """Ask for files to be fetched into the cache, in this order, while other work goes on."""
    rows = [(one.url, one.known) for one in places if isinstance(one, Remote)]
    if rows and cache.limit:
        client.ask("ahead", files=rows, cache=str(cache.folder), limit=cache.limit)


class _File(io.RawIOBase):
    """Ranges as a file that is read from front to back, or sought in."""

    def __init__(self, ranges: Ranges):
        self.ranges, self._at = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.ranges.stat.bytes}
        self._at = base[whence] + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:
        data = self.ranges.pread(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def as_file(ranges: Ranges) -> io.BufferedReader:
    """Return ranges as a file object."""
    return io.BufferedReader(_File(ranges), 2**16)
