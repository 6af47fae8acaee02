"""The tars of a split, each opened when it is needed: an indexed folder of any size starts at once.

`dataset.json`, which `cascade data index` writes into a folder of tars, holds the numbers of each
tar and the totals; the samples themselves are in the indexes beside the tars. What was indexed is
not read as anything else: a tar that changed, came or went is refused.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from cascade.data.index import (
    CUT,
    LIMITS,
    MEMBERS,
    Index,
    Paths,
    Summary,
    check_unchanged,
    counted,
    load,
    save,
    scan,
    tars,
)
from cascade.data.transforms import BadSample
from cascade.errors import UserError
from cascade.files import write_atomically

log = logging.getLogger(__name__)

DATASET = "dataset.json"
MEND = "fetch or write it again"
LONG = 5.0  # seconds after which a start without an index says so


class OpenTar:
    """The samples of one tar that have the captions asked for, read by their places 0, 1, ..."""

    def __init__(self, index: Index, captions: Set[str]):
        self.shard, self._index, self._captions = index.tar.stem, index, captions
        self._rows, self._file = index.usable(captions), _opened(index.tar)

    def __reduce__(self):  # an open file does not travel to a worker
        return OpenTar, (self._index, self._captions)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, place: int) -> str:
        return self._index.key(int(self._rows[place]))

    def read(self, place: int, member: str) -> bytes:
        """The bytes of "picture", "txt" or "json", b"" if there is none.

        Raises:
            BadSample: the tar cannot be read there, or it is over the limit of `LIMITS`.
        """
        offset, size = self._index.spans[self._rows[place], MEMBERS.index(member)].tolist()
        if not 0 <= size <= LIMITS[member]:
            raise BadSample("huge file")
        try:
            data = os.pread(self._file.fileno(), size, offset) if size else b""
        except OSError as error:
            raise BadSample("cannot be read") from error
        if len(data) < size:
            raise BadSample("cannot be read")
        return data


class Placed(NamedTuple):
    """One of the samples of an open tar."""

    tar: OpenTar
    place: int

    @property
    def shard(self) -> str:
        return self.tar.shard

    @property
    def key(self) -> str:
        return self.tar.key(self.place)

    def read(self, member: str) -> bytes:
        """As `OpenTar.read`."""
        return self.tar.read(self.place, member)


def _opened(tar: Path) -> IO[bytes]:
    try:
        return open(tar, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read {tar}: {os.strerror(error.errno or 0)}") from error


class Corpus:
    """The tars of a split, in the order of their names.

    Args:
        path: a folder, a glob, or a list of tars.
        split: only tars called `{split}-*`; all, if no name carries a split or a list has no such.
        captions: members that may caption a sample: of "txt" and "json".
        at_hand: how many tars are kept open.

    Attributes:
        paths: of the tars.
        counts: of the samples of each tar.
        left_out: how many samples were left out, by reason.

    Raises:
        UserError: no tars, one that cannot be read or is not as it was indexed, or no usable
            sample in them.
    """

    def __init__(self, path: Paths, split: str, captions: Set[str], at_hand: int):
        self.paths, self.captions, self._at_hand = tars(path, split), captions, at_hand
        self._open: dict[int, OpenTar] = {}  # the one used last comes last
        self._scanned: dict[int, Index] = {}
        self._summaries = self._read(path, split)
        self.counts = [summary.usable(captions) for summary in self._summaries]
        self.left_out: Counter[str] = Counter()
        for summary, count in zip(self._summaries, self.counts):
            self.left_out.update(summary.left_out)
            self.left_out["no caption"] += summary.samples - count
        self.left_out = +self.left_out
        if not sum(self.counts):
            raise UserError(
                f"{path} has no usable sample ({counted(self.left_out)}): a sample is a picture "
                f"(jpg, jpeg, png, webp) and a caption ({', '.join(sorted(captions))}) side by side"
            )
        cut = [n for n, summary in enumerate(self._summaries) if summary.left_out.get(CUT)]
        for n in cut[:3]:
            samples = self._summaries[n].samples
            log.warning("%s is %s after %d samples: %s", self.paths[n], CUT, samples, MEND)
        if self.left_out:
            log.warning("%s: samples left out: %s", path, counted(self.left_out))

    @cached_property
    def fingerprint(self) -> str:
        """Of the tars: names, bytes and numbers of samples, and so of the order as well."""
        found = ((p.name, p.stat().st_size, n) for p, n in zip(self.paths, self.counts))
        return hashlib.sha256("".join(f"{tar}\n" for tar in found).encode()).hexdigest()[:16]

    def _read(self, path: Paths, split: str) -> list[Summary]:
        datasets = {folder: read_dataset(folder) for folder in {p.parent for p in self.paths}}
        whole = isinstance(path, str | Path) and Path(path).is_dir()
        if whole and (listed := datasets[Path(path)]) is not None:
            named = self.paths[0].name.startswith(f"{split}-")
            expected = {name for name in listed if not named or name.startswith(f"{split}-")}
            if gone := sorted(expected - {p.name for p in self.paths}):
                raise UserError(f"{Path(path) / gone[0]} is gone: {_remedy(Path(path))}")
        summaries, start = [], time.monotonic()
        for n, tar in enumerate(self.paths):
            if (listed := datasets[tar.parent]) is not None:
                if tar.name not in listed:
                    raise UserError(f"{tar} is not in {DATASET}: {_remedy(tar.parent)}")
                check_unchanged(tar, listed[tar.name])
                summaries.append(listed[tar.name])
            else:
                self._scanned[n] = scan(tar)
                summaries.append(self._scanned[n].summary)
                if start and time.monotonic() - start > LONG:
                    log.warning(
                        "%s has no index, and so all %d tars are searched at each start: %s",
                        tar.parent,
                        len(self.paths),
                        _remedy(tar.parent),
                    )
                    start = 0.0
        return summaries

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to a worker

    def __getitem__(self, n: int) -> OpenTar:
        """Tar n. Raises UserError if it cannot be opened, or its index is stale or damaged."""
        tar = self._open.pop(n, None)
        if tar is None:
            index = self._scanned.get(n) or load(self.paths[n])
            check_unchanged(self.paths[n], index)
            if index.summary != self._summaries[n]:
                tar = self.paths[n]
                raise UserError(f"{tar}: its index is not {DATASET}'s: {_remedy(tar.parent)}")
            tar = OpenTar(index, self.captions)
            if len(self._open) >= self._at_hand:
                del self._open[next(iter(self._open))]
        self._open[n] = tar
        return tar


def index_folder(
    folder: Path, progress: Callable[[int, int], None]
) -> tuple[dict[str, Summary], list[str]]:
    """Indexes the tars of a folder, one at a time, and writes `dataset.json`.

    Tars with a valid index are passed over, so that an interrupted call goes on.

    Args:
        progress: called with (tars done, tars in all).

    Returns:
        The summary of each tar by file name, and what is wrong with those that cannot be read.

    Raises:
        UserError: no tars, or the folder cannot be written to.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar is there; give the folder of the shards")
    summaries, unreadable = {}, []
    try:
        for n, tar in enumerate(paths):
            try:
                summaries[tar.name] = _indexed(tar).summary
            except UserError as error:
                unreadable.append(str(error))
            progress(n + 1, len(paths))
        totals = total(summaries.values())
        found = {
            "totals": {"tars": len(summaries), **asdict(totals)},
            "tars": {name: asdict(summary) for name, summary in summaries.items()},
        }
        del found["totals"]["mtime_ns"]
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(folder / DATASET, lambda beside: beside.write_text(text))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {os.strerror(error.errno or 0)}") from error
    return summaries, unreadable


def _indexed(tar: Path) -> Index:
    try:
        index = load(tar)
        check_unchanged(tar, index)
    except UserError:
        index = scan(tar)
        save(index)
    return index


def total(summaries: Iterable[Summary]) -> Summary:
    """The sums; the time is the latest."""
    rows = list(summaries)
    left_out = sum((Counter(row.left_out) for row in rows), Counter())
    sums = (sum(getattr(row, name) for row in rows) for name in ("samples", "txt", "json"))
    latest = max((row.mtime_ns for row in rows), default=0)
    return Summary(sum(row.bytes for row in rows), latest, *sums, dict(left_out))


def read_dataset(folder: Path) -> dict[str, Summary] | None:
    """The summary of each tar of an indexed folder, by file name; None if it was not indexed.

    Raises:
        UserError: `dataset.json` is damaged.
    """
    path = folder / DATASET
    try:
        if not path.exists():
            return None
        found = json.loads(path.read_text())["tars"]
        return {name: _summary(numbers) for name, numbers in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {_remedy(folder)}") from error


def _summary(numbers: Mapping[str, Any]) -> Summary:
    summary = Summary(**numbers)
    plain = [n for name, n in numbers.items() if name != "left_out"]
    if not all(type(n) is int for n in (*plain, *summary.left_out.values())):
        raise TypeError("not a number")
    return summary


def _remedy(folder: Path) -> str:
    return f"run `cascade data index {folder}`"
