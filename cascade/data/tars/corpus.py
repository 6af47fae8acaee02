"""The tars of a split, each opened on first use, so that indexed folders of any size start at once.

Tars that were changed, added or removed since the folder was indexed (`cascade.data.tars.dataset`)
are refused.
"""

import hashlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Int32

from cascade.data.tars import index as indexes
from cascade.data.tars.dataset import DATASET, Dataset, read_dataset, renew, tars_in, total
from cascade.data.tars.index import Index, Summary, check_unchanged, counted, load, remedy, scan
from cascade.data.tars.keys import DOTTED, FIRST_DOT, REMEDY
from cascade.data.tars.open_tar import OpenTar
from cascade.data.tars.splits import ALL, chosen, lacking
from cascade.data.tars.tar import Paths
from cascade.errors import UserError
from cascade.files.stores import places
from cascade.files.stores.cache import GB, Cache
from cascade.files.stores.places import Place, Remote, Stat, place
from cascade.files.stores.reading import fetch_ahead

log = logging.getLogger(__name__)

MEND = "fetch or write it again"
LONG = 5.0  # seconds of searching tars without an index after which a warning is logged


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
        index: the folder with the index; None: the tars' own.
        cache_gb: the size limit in GB of this node's cache of pieces of tars in stores; 0: none.

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
        index: str | Place | None = None,
        cache_gb: float | int = GB,
    ):
        self.captions, self._max_open = captions, max_open
        self._keys, self._hold_out = keys, hold_out
        self._open: dict[int, OpenTar] = {}  # least recently used first
        self._scanned: dict[int, Index] = {}
        self._index, self._cache = index and place(index), Cache.of(cache_gb)
        found = tars_in(path, self._index)
        folders = {tar.parent for tar in found}
        self._datasets = {folder: read_dataset(self._index or folder) for folder in folders}
        if self._index and None in self._datasets.values():
            raise UserError(f"{index} has no {DATASET}: {self._remedy(found[0])}")
        if hold_out and None in self._datasets.values():
            raise UserError(f"hold_out={hold_out}: {path} has no index; {self._remedy(found[0])}")
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
        sizes = (summary.bytes for summary in self._summaries)
        found = [(p.name, size, n) for p, size, n in zip(self.paths, sizes, self.counts)]
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

    def _remedy(self, tar: Place) -> str:
        return remedy(tar.parent, self._index)

    def _share(self, folder: Place, name: str) -> float:
        if (dataset := self._datasets[folder]) is None:
            return 0.0
        if self._hold_out is not None:
            dataset = replace(dataset, held_out=self._hold_out)
        return dataset.share(name)

    def _chosen(self, path: Paths, found: Sequence[Place], split: str) -> tuple[list[Place], str]:
        """Return the tars of a split, and which part of their samples belongs to it."""
        one_by_one = not isinstance(path, str | Place)
        shares = {tar.stem: self._share(tar.parent, tar.stem) for tar in found}
        names, part = chosen(shares, split, one_by_one)
        if not names:
            raise lacking(path, list(shares), split)
        folder = None if one_by_one else place(path)
        if folder and places.is_folder(folder) and (whole := self._datasets[folder]):
            stems = (name.removesuffix(".tar") for name in whole.tars if name[0] != ".")
            shares |= {stem: self._share(folder, stem) for stem in stems}
            if gone := sorted({*chosen(shares, split)[0]} - {*names}):
                raise UserError(f"{folder / gone[0]}.tar is gone: {self._remedy(found[0])}")
        kept = set(names)
        return [tar for tar in found if tar.stem in kept], part

    def _read(self) -> list[Summary]:
        start, moved = time.monotonic(), defaultdict(dict)
        warned = False
        summaries = []
        for n, tar in enumerate(self.paths):
            if (dataset := self._datasets[tar.parent]) is not None:
                summaries.append(self._noted(tar, dataset, moved[tar.parent]))
                if isinstance(tar, Remote) and not warned and time.monotonic() - start > LONG:
                    warned = True
                    log.warning(
                        "%s: tars with another ETag or time than in the index are read as a whole, "
                        "to compare them, at each start: %s to note the new ones",
                        *(tar.parent, self._remedy(tar)),
                    )
                continue
            self._scanned[n] = scan(tar, self._keys or FIRST_DOT)
            summaries.append(self._scanned[n].summary())
            if start and time.monotonic() - start > LONG:
                log.warning(
                    "%s has no index, so all %d tars are searched at each start: %s",
                    *(tar.parent, len(self.paths), self._remedy(tar)),
                )
                start = 0.0
        for folder, stats in moved.items():
            if stats and not isinstance(where := self._index or folder, Remote):
                renew(where, self._datasets[folder], stats)
        return summaries

    def _noted(self, tar: Place, dataset: Dataset, moved: dict[str, Stat]) -> Summary:
        """Return the summary of a tar from its folder's; add a changed time to `moved`."""
        if tar.name not in dataset.tars:
            raise UserError(f"{tar} is not in {DATASET}: {self._remedy(tar)}")
        if self._keys not in (None, dataset.keys):
            raise UserError(
                f"{tar.parent} was indexed with keys={dataset.keys}, not {self._keys}: "
                f"{self._remedy(tar)[:-1]} --keys {self._keys}`"
            )
        summary, share = dataset.tars[tar.name], self._share(tar.parent, tar.stem)
        if share != dataset.held_out:
            index = load(tar, self._index) if share else None
            summary = index.summary(share) if index else replace(summary, held_out={})
        if isinstance(tar, Remote) and tar.known is None:
            return summary  # not listed: to ask for each of many tars takes long
        now = check_unchanged(tar, summary, self._index)
        if (now.mtime_ns, now.version) == (summary.mtime_ns, summary.version):
            return summary
        moved[tar.name] = now
        return replace(summary, mtime_ns=now.mtime_ns, version=now.version)

    def sides(self) -> Iterator[Int32[np.ndarray, "n 2"]]:
        """Yield the height and width of each tar's upright pictures; 0 if a header is broken.

        This reads the index of every tar.

        Raises:
            UserError: the tars have no index, or one without sides.
        """
        for n, tar in enumerate(self.paths):
            if (found := self[n].sides) is None:
                again = self._remedy(tar)
                raise UserError(f"{tar}: buckets need an index with the sides of pictures: {again}")
            yield found

    @property
    def is_remote(self) -> bool:
        return any(isinstance(tar, Remote) for tar in self.paths)

    def fetch_ahead(self, tars: Iterable[int]) -> None:
        """Begin to fetch tars of stores into the cache."""
        fetch_ahead([self.paths[n] for n in tars], self._cache)

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
            now = check_unchanged(path, summary, self._index)
            about = {"mtime_ns": now.mtime_ns, "version": now.version}
            summary = self._summaries[n] = replace(summary, **about)
            index = self._scanned.get(n) or load(path, self._index)
            share = self._share(path.parent, path.stem)
            if replace(index.summary(share), **about) != summary:
                again = self._remedy(path)
                raise UserError(f"{path}: its index contradicts {DATASET}: {again}")
            # What is read later is of the version that was compared.
            index = replace(index, tar=places.as_known(path, now))
            tar = OpenTar(index, self.captions, self.part, share, self._cache)
            if len(self._open) >= self._max_open:
                del self._open[next(iter(self._open))]
        self._open[n] = tar
        return tar


def _hashed(rows: Iterable[tuple], part: str) -> str:
    text = "".join(f"{row}\n" for row in rows) + part
    return hashlib.sha256(text.encode()).hexdigest()[:16]
