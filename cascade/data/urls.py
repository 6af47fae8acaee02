"""Tars behind URLs and commands, read once from front to back.

A sample counts when the next one begins, or the tar has its end: what was cut short anywhere is
found out, whatever a server or a command said. Nothing is decoded here.
"""

import logging
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from subprocess import TimeoutExpired
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from cascade.data.index import CAPTIONS, CUT, HOSTILE, LIMITS, PICTURES, Header
from cascade.data.transforms import BadSample
from cascade.errors import UserError

log = logging.getLogger(__name__)

WAITS = (1.0, 5.0)  # seconds before a tar that broke off is read once more

BROKEN = (OSError, tarfile.TarError, ValueError, RecursionError)

_LIMITS = {e: LIMITS.get(e, LIMITS["picture"]) for e in (*PICTURES, *CAPTIONS)}
_PADDING = 2**20  # zeros behind the end of a tar: more than any usual record


class Streamed(NamedTuple):
    """A sample in memory: its shard, its key, and its members; None: too long to be read."""

    shard: str
    key: str
    members: dict[str, bytes | None]

    def read(self, member: str) -> bytes:
        """The bytes of "picture", "txt" or "json", b"" if there is none.

        Raises:
            BadSample: it is over its limit.
        """
        data = self.members.get(member, b"")
        if data is None:
            raise BadSample("huge file")
        return data


def named(urls: str | Sequence[str], split: str, allow_pipe: bool) -> dict[str, str]:
    """The URLs of a split by the names of the tars.

    Raises:
        UserError: one that cannot or may not be opened, two tars of one name, or none of the split.
    """
    found = [u for some in ([urls] if isinstance(urls, str) else urls) for u in expand_urls(some)]
    for url in found:
        scheme = urlparse(url).scheme
        if scheme == "pipe" and not allow_pipe:
            raise UserError(f"{url} runs a command: if it is yours, set data.allow_pipe=true")
        if scheme not in ("", "file", *gopen_schemes):
            raise UserError(f"{url}: use 'pipe:COMMAND', which prints it, and data.allow_pipe=true")
        local = {"": url, "file": url2pathname(urlparse(url).path)}.get(scheme)
        if local and not Path(local).is_file():
            raise UserError(f"{url}: no such file")
    tars = {_name(url): url for url in found}
    if len(tars) < len(found):
        twice = Counter(map(_name, found)).most_common(1)[0][0]
        raise UserError(f"two tars are called {twice}: rename one, as names tell them apart")
    splits = {match[1] for name in tars if (match := re.match(r"([a-zA-Z]\w*)-", name))}
    chosen = {name: u for name, u in tars.items() if not splits or name.startswith(f"{split}-")}
    if not chosen:
        raise UserError(
            f"data.urls has no {split}-*.tar, but {sorted(splits)}: add them, or choose another "
            "data.split (of sample grids: grid_split, or grids=0)"
        )
    return chosen


def _name(url: str) -> str:
    """`train-00000` of any URL or command that names train-00000.tar; else all of it."""
    return (re.findall(r"([^/\s'\"=?&]+)\.tar\b", url) or [url])[-1]


def streamed(name: str, url: str, bad: list[tuple[str, str]]) -> Iterator[Streamed]:
    """The usable samples of a tar. One that breaks off is opened again, and gone on with."""
    given, keys = 0, set()
    for wait in (*WAITS, None):
        try:
            for key, members in islice(groups(url), given, None):
                given += 1
                picture = next((members[e] for e in PICTURES if e in members), b"")
                captions = {e: members[e] for e in CAPTIONS if e in members}
                if HOSTILE.search(key):
                    bad.append((f"{name}/{key!r}", "hostile name"))
                elif picture == b"":
                    bad.append((f"{name}/{key}", "no picture"))
                elif not captions:
                    bad.append((f"{name}/{key}", "no caption"))
                elif key in keys:
                    bad.append((f"{name}/{key}", "duplicate key"))
                else:
                    keys.add(key)
                    yield Streamed(name, key, {"picture": picture, **captions})
            return
        except BROKEN as error:
            if wait is None:
                log.warning("%s breaks off after %d samples: %s", url, given, error)
            else:
                time.sleep(wait)
    bad.append((f"{name}/", CUT if given else "cannot be read"))


def groups(url: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """The runs of members with one key, as `index` has them; the last one if the tar has its end.

    Raises:
        one of `BROKEN`: it cannot be opened, or breaks off.
    """
    now, members = None, {}
    for member, tar in _members(url):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if not stem or not member.isreg() or member.issparse():
            continue
        if key != now or extension in members:
            if now is not None:
                yield now, members
            now, members = key, {}
        if member.size and extension in _LIMITS:
            short = member.size <= _LIMITS[extension]
            members[extension] = tar.extractfile(member).read() if short else None
    if now is not None:
        yield now, members


class _Header(Header):
    @classmethod
    def fromtarfile(cls, tar: "_Tar") -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.ended = True
            raise


class _Tar(tarfile.TarFile):
    """Tells its end, a block of zeros, from a damaged or missing header: `tarfile` does not."""

    tarinfo = _Header
    ended = False


def _members(url: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    try:
        stream = gopen(url)
    except ValueError as error:  # WDS_SECURE=1 in the environment
        raise UserError(f"{url}: {error}") from error
    try:
        # Not compressed, as those that are indexed: a kilobyte could become a gigabyte.
        with _Tar.open(fileobj=stream, mode="r|") as tar:
            while member := tar.next():
                yield member, tar
                tar.members.clear()
            # What follows is read, or the command that prints it would complain.
            rest = tar.fileobj.read(_PADDING + 1)
            if not tar.ended or len(rest) > _PADDING or any(rest):
                raise tarfile.ReadError("no end")
    finally:
        with suppress(OSError, TimeoutExpired):  # a command that fails behind the end did its work
            stream.close()
