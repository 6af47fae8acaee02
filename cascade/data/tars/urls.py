"""Reads tars from URLs and commands, sequentially.

A sample is complete once the next one begins or the tar's end marker is read: truncation is
detected whatever a server or command reported. Nothing is decoded here.
"""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from subprocess import TimeoutExpired
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import pathname2url, url2pathname

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from cascade.data.tars import keys as rules
from cascade.data.tars.index import CUT, LIMITS
from cascade.data.tars.keys import CAPTIONS, DOTTED, FIRST_DOT, PICTURES
from cascade.data.tars.splits import lacking, of_split
from cascade.data.tars.tar import BROKEN, WRONG_SIZE, Compressed, StreamMember, is_whole
from cascade.data.tars.tar import streamed as members_of
from cascade.data.transforms import BadSample
from cascade.errors import UserError

log = logging.getLogger(__name__)

WAITS = (1.0, 5.0)  # seconds before each retry of a tar whose reading failed

_LIMITS = {e: LIMITS.get(e, LIMITS["picture"]) for e in (*PICTURES, *CAPTIONS)}


class Streamed(NamedTuple):
    """A sample in memory: shard, key, and members, or why they cannot be used."""

    shard: str
    key: str
    members: dict[str, bytes | BadSample]

    def read(self, member: str) -> bytes:
        """Return the bytes of "picture", "txt" or "json", b"" if absent.

        Raises:
            BadSample: the member exceeds its limit, or its size in the header is wrong.
        """
        data = self.members.get(member, b"")
        if isinstance(data, BadSample):
            raise data
        return data


def named(urls: str | Sequence[str], split: str, allow_pipe: bool) -> dict[str, str]:
    """Return the URLs of a split's tars, by the tars' names.

    Raises:
        UserError: a URL that cannot or may not be opened, two tars of one name, or no tar of the
            split.
    """
    given = [urls] if isinstance(urls, str) else urls
    # An existing file is never a pattern of braces and "::".
    found = [url for some in given for url in ([some] if _is_file(some) else expand_urls(some))]
    for url in found:
        scheme = "" if _is_file(url) else urlparse(url).scheme
        if scheme == "pipe" and not allow_pipe:
            raise UserError(f"{url} runs a command: set data.allow_pipe=true if you trust it")
        if scheme not in ("", "file", *gopen_schemes):
            raise UserError(
                f"{url}: unknown scheme; use 'pipe:COMMAND' to print the tar, with "
                "data.allow_pipe=true"
            )
        local = {"": url, "file": url2pathname(urlparse(url).path)}.get(scheme)
        if local and not Path(local).is_file():
            raise UserError(f"{url}: no such file")
    tars = {_name(url): url for url in found}
    if len(tars) < len(found):
        twice = Counter(map(_name, found)).most_common(1)[0][0]
        raise UserError(f"two tars are called {twice}: rename one, as names identify tars")
    chosen = of_split(list(tars), split)
    if not chosen:
        raise lacking("data.urls", list(tars), split)
    return {name: tars[name] for name in chosen}


def _is_file(url: str) -> bool:
    try:
        return Path(url).is_file()
    except (OSError, ValueError):  # a command may be too long for a file name
        return False


def _name(url: str) -> str:
    """Return `train-00000` for a URL or command that contains train-00000.tar; else all of it."""
    return (re.findall(r"([^/\s'\"=?&]+)\.tar\b", url) or [url])[-1]


def streamed(
    name: str, url: str, bad: list[tuple[str, str]], keys: str = FIRST_DOT
) -> Iterator[Streamed]:
    """Yield the usable samples of a tar; if reading fails, reopen it and continue where it failed.

    Args:
        bad: bad samples, as "shard/key" and reason, are appended to it.
        keys: where a key ends in a name.
    """
    given, seen = 0, _Seen(name, bad)
    for wait in (*WAITS, None):
        try:
            for group in islice(groups(url, keys), given, None):
                given += 1
                if seen.good(group):
                    yield Streamed(name, group.key, {"picture": group.picture, **group.captions})
            return
        except BROKEN as error:
            if wait is None or isinstance(error, Compressed):
                log.warning("%s: reading failed after %d samples: %s", url, given, error)
                break
            time.sleep(wait)
    bad.append((f"{name}/", CUT if given else "cannot be read"))


class _Seen:
    """Separates the good samples of a tar from bad ones, which it records, with some warnings."""

    def __init__(self, name: str, bad: list[tuple[str, str]]):
        self.name, self.bad = name, bad
        self.good_keys: set[str] = set()
        self.halves: dict[str, str] = {}  # by key, what the sample lacks
        self.warned: set[str] = set()

    def good(self, group: rules.Group) -> bool:
        if group.dotted:
            self._warn(f"{group.first}: {rules.REMEDY}", DOTTED)
            self.bad += [(f"{self.name}/{group.first}", DOTTED)] * group.dotted
            if not group.members:
                return False
        fault = group.fault or (rules.DUPLICATE if group.key in self.good_keys else "")
        if not fault:
            self.good_keys.add(group.key)
            return True
        if {self.halves.setdefault(group.key, fault), fault} == {
            rules.NO_PICTURE,
            rules.NO_CAPTION,
        }:
            what = f"picture and caption of {group.key} are not adjacent: write the tar sorted"
            self._warn(f"{what}, as tar --sort=name does", "unsorted")
            return False  # recorded with its first half
        key = repr(group.key) if fault == rules.HOSTILE_NAME else group.key
        self.bad.append((f"{self.name}/{key}", fault))
        return False

    def _warn(self, text: str, what: str) -> None:
        if what not in self.warned:
            log.warning("%s: %s", self.name, text)
        self.warned.add(what)


def groups(url: str, keys: str = FIRST_DOT) -> Iterator[rules.Group]:
    """Yield the groups of a tar as `index.scan` does; the last one only if the tar is complete.

    Raises:
        one of `BROKEN`: the tar cannot be opened, or reading it fails.
    """
    if urlparse(url).scheme and _is_file(url):  # a colon in a path
        url = f"file:{pathname2url(os.path.abspath(url))}"
    try:
        stream = gopen(url)
    except ValueError as error:  # WDS_SECURE=1 in the environment
        raise UserError(f"{url}: {error}") from error
    try:
        yield from rules.grouped(members_of(stream), keys, _taken)
    finally:
        with suppress(OSError, TimeoutExpired):  # a command may fail once its output was read
            stream.close()


def _taken(member: StreamMember) -> bytes | BadSample:
    extension = member.name.rpartition(".")[2].lower()
    if member.bytes > _LIMITS[extension]:
        return BadSample("huge file")
    blocks = member.read()
    return blocks[: member.bytes] if is_whole(blocks, member.bytes) else BadSample(WRONG_SIZE)
