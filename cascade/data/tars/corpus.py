"""The tars of a split, each opened on first use, so that indexed folders of any size start at once.

Tars that were changed, added or removed since the folder was indexed (`cascade.data.tars.dataset`)
are refused.
"""

import hashlib
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cascade.data.tars import index as indexes
from cascade.data.tars.dataset import DATASET, Dataset, read_dataset, renew, total
from cascade.data.tars.index import Index, Summary, check_unchanged, counted, load, remedy, scan
from cascade.data.tars.keys import DOTTED, FIRST_DOT, REMEDY
from cascade.data.tars.splits import ALL, chosen, lacking
from cascade.data.tars.tar import Paths, listed
from cascade.data.transforms import BadSample
from cascade.errors import UserError, explained

log = logging.getLogger(__name__)

MEND = "fetch or write it again"
LONG = 5.0  # seconds of searching tars without an index after which a warning is logged


class OpenTar:
    """The samples of a part of one tar that have one of the captions, by places 0, 1, ..."""

    def __init__(self, index: Index, captions: Set[str], part: str = ALL, share: float = 0.0):
        self.shard, self._index = index.tar.stem, index
        self._given = index, captions, part, share
        self._rows = index.usable(captions, part, share)
        with explained(f"cannot read {index.tar}"):
            self._file = open(index.tar, "rb", buffering=0)  # noqa: SIM115 (kept open)

    def __reduce__(self):  # open files cannot be sent to workers
        return OpenTar, self._given

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, place: int) -> str:
        return self._index.key(int(self._rows[place]))

    def read(self, place: int, member: str) -> bytes:
        """Return the bytes of "picture", "txt" or "json", b"" if absent.

        Raises:
            BadSample: the tar cannot be read there, or the member exceeds `index.LIMITS`.
        """
        offset, size = self._index.spans[self._rows[place], indexes.MEMBERS.index(member)].tolist()
        if not 0 <= size <= indexes.LIMITS[member]:
            raise BadSample("huge file")
        try:
            data = os.pread(self._file.fileno(), size, offset) if size else b""
        except OSError as error:
            raise BadSample("cannot be read") from error
        if len(data) < size:
            raise BadSample("cannot be read")
        return data


class Placed(NamedTuple):
    """A sample of an open tar."""

    tar: OpenTar
    place: int

    @property
    def shard(self) -> str:
        return self.tar.shard

    @property
    def key(self) -> str:
        return self.tar.key(self.place)

    def read(self, member: str) -> bytes:
        """Read a member, as `OpenTar.read` does."""
        return self.tar.read(self.place, member)


class Corpus:
    """The tars of a split, in the order of their names.

    Args:
        path: a folder, a tar, a glob, or a list of tars.
        split: selects tars by name (`splits.of_split`); "val" may instead be the pictures that the
            folder's index holds out, which other splits then lack; "all" is everything.
        captions: the members that may caption a sample: "txt", "json" or both.
        max_open: how many tars are kept open.
        keys: where a key ends in a name; None: as the folder was indexed, or at the first dot.
        hold_out: share of the pictures to hold out, instead of the index's; 0: none.

    Attributes:
        paths: of the tars.
        counts: the number of samples of each tar.
        usable: how many samples the tars have, including other splits'.
        left_out: how many samples were left out, by reason; `such_as` names one of each.
        share: the share of the pictures that is held out of these tars, or that alone is taken.

    Raises:
        UserError: no tars, one that cannot be read or has changed since it was indexed, another
            rule for keys than the index's, or no usable sample in them.
    """

    def __init__(
        self,
        path: Paths,
        split: str,
        captions: Set[str],
        max_open: int,
        keys: str | None = None,
        hold_out: float | None = None,
    ):
        self.captions, self._max_open = captions, max_open
        self._keys, self._hold_out = keys, hold_out
        self._open: dict[int, OpenTar] = {}  # least recently used first
        self._scanned: dict[int, Index] = {}
        found = listed(path)
        self._datasets = {folder: read_dataset(folder) for folder in {p.parent for p in found}}
        if hold_out and None in self._datasets.values():
            raise UserError(f"hold_out={hold_out}: {path} has no index; {remedy(found[0].parent)}")
        self.paths, self.part = self._chosen(path, found, split)
        self._summaries = self._read()
        self.counts = [summary.usable(captions, self.part) for summary in self._summaries]
        self.usable = sum(summary.usable(captions) for summary in self._summaries)
        self.left_out: Counter[str] = Counter()
        for summary in self._summaries:
            self.left_out.update(summary.left_out)
            self.left_out["no caption"] += summary.samples - summary.usable(captions)
        self.left_out = +self.left_out
        self.such_as = total(self._summaries).such_as
        self._complain(path)

    @property
    def lost(self) -> str:
        """Samples and files that were left out, by reason, and how to recover them."""
        hint = f"; {REMEDY}" if DOTTED in self.left_out else ""
        return counted(self.left_out, self.such_as) + hint

    @property
    def share(self) -> float:
        shares = {self._share(tar.parent, tar.stem) for tar in self.paths}
        return max(shares) if self.part != ALL else 0.0

    @property
    def part_of_tars(self) -> str:
        """Which samples of the tars are taken, for hashes; "" for all."""
        return f", {self.part}, held out {self.share}" if self.share else ""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tars' names, sizes and sample counts, and thus of the order."""
        found = [(p.name, p.stat().st_size, n) for p, n in zip(self.paths, self.counts)]
        return _hashed(found, self.part_of_tars)

    @cached_property
    def identity(self) -> str | None:
        """A hash of the tars' contents in order, whatever their paths and names.

        None if some were never read as a whole.
        """
        digests = [summary.digest for summary in self._summaries]
        if not all(digests):
            return None
        return _hashed(zip(digests, self.counts), self.part_of_tars)

    def _share(self, folder: Path, name: str) -> float:
        if (dataset := self._datasets[folder]) is None:
            return 0.0
        if self._hold_out is not None:
            dataset = replace(dataset, held_out=self._hold_out)
        return dataset.share(name)

    def _chosen(self, path: Paths, found: Sequence[Path], split: str) -> tuple[list[Path], str]:
        """Return the tars of a split, and which part of their samples belongs to it."""
        one_by_one = not isinstance(path, str | Path)
        shares = {tar.stem: self._share(tar.parent, tar.stem) for tar in found}
        names, part = chosen(shares, split, one_by_one)
        if not names:
            raise lacking(path, list(shares), split)
        whole = not one_by_one and Path(path).is_dir() and self._datasets[Path(path)]
        if whole:
            stems = (name.removesuffix(".tar") for name in whole.tars if name[0] != ".")
            shares |= {stem: self._share(Path(path), stem) for stem in stems}
            if gone := sorted({*chosen(shares, split)[0]} - {*names}):
                raise UserError(f"{Path(path) / gone[0]}.tar is gone: {remedy(Path(path))}")
        return [tar for tar in found if tar.stem in names], part

    def _read(self) -> list[Summary]:
        start, moved = time.monotonic(), defaultdict(dict)
        summaries = []
        for n, tar in enumerate(self.paths):
            if (dataset := self._datasets[tar.parent]) is not None:
                summaries.append(self._noted(tar, dataset, moved[tar.parent]))
                continue
            self._scanned[n] = scan(tar, self._keys or FIRST_DOT)
            summaries.append(self._scanned[n].summary())
            if start and time.monotonic() - start > LONG:
                log.warning(
                    "%s has no index, so all %d tars are searched at each start: %s",
                    *(tar.parent, len(self.paths), remedy(tar.parent)),
                )
                start = 0.0
        for folder, times in moved.items():
            if times:
                renew(folder, self._datasets[folder], times)
        return summaries

    def _noted(self, tar: Path, dataset: Dataset, moved: dict[str, int]) -> Summary:
        """Return the summary of a tar from its folder's; add a changed time to `moved`."""
        if tar.name not in dataset.tars:
            raise UserError(f"{tar} is not in {DATASET}: {remedy(tar.parent)}")
        if self._keys not in (None, dataset.keys):
            raise UserError(
                f"{tar.parent} was indexed with keys={dataset.keys}, not {self._keys}: "
                f"{remedy(tar.parent)[:-1]} --keys {self._keys}`"
            )
        summary, share = dataset.tars[tar.name], self._share(tar.parent, tar.stem)
        if share != dataset.held_out:
            summary = load(tar).summary(share) if share else replace(summary, held_out={})
        now = check_unchanged(tar, summary)
        if now == summary.mtime_ns:
            return summary
        moved[tar.name] = now
        return replace(summary, mtime_ns=now)

    def _complain(self, path: Paths) -> None:
        if not sum(self.counts):
            raise UserError(
                f"{path} has no usable sample ({self.lost}): a sample is a picture "
                f"(jpg, jpeg, png, webp) and a caption ({', '.join(sorted(self.captions))}) with "
                "the same key"
            )
        cut = [n for n, summary in enumerate(self._summaries) if summary.left_out.get(indexes.CUT)]
        for n in cut[:3]:
            samples = self._summaries[n].samples
            log.warning("%s is %s after %d samples: %s", self.paths[n], indexes.CUT, samples, MEND)
        if self.left_out:
            log.warning("%s: samples left out: %s", path, self.lost)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # open files cannot be sent to workers

    def __getitem__(self, n: int) -> OpenTar:
        """Open tar n. Raises UserError if that fails, or its index is outdated or damaged."""
        tar = self._open.pop(n, None)
        if tar is None:
            path, summary = self.paths[n], self._summaries[n]
            if (now := check_unchanged(path, summary)) != summary.mtime_ns:
                summary = self._summaries[n] = replace(summary, mtime_ns=now)
            index, share = self._scanned.get(n) or load(path), self._share(path.parent, path.stem)
            if replace(index.summary(share), mtime_ns=now) != summary:
                raise UserError(f"{path}: its index contradicts {DATASET}: {remedy(path.parent)}")
            tar = OpenTar(index, self.captions, self.part, share)
            if len(self._open) >= self._max_open:
                del self._open[next(iter(self._open))]
        self._open[n] = tar
        return tar


def _hashed(rows: Iterable[tuple], part: str) -> str:
    text = "".join(f"{row}\n" for row in rows) + part
    return hashlib.sha256(text.encode()).hexdigest()[:16]
