"""Training samples from WebDataset tars on a disk or in a store, indexed by sample number.

The sample number alone determines what is read, independently of batch size, ranks and workers, so
one integer suffices to resume a run. Embeddings are joined by (shard, key), never by row. A bad
sample is replaced by the next good one of its block and reported. Nothing here unpickles: shards
contain pictures, text, JSON and safetensors.
"""

import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from torch.utils.data import Dataset

from cascade.buckets import Buckets
from cascade.data.embeddings import Embeddings
from cascade.data.items import MAX_BAD_IN_A_ROW, Items, Skip
from cascade.data.order import BucketOrder, Order
from cascade.data.preflight import preflight
from cascade.data.tars.corpus import Corpus
from cascade.data.tars.framed import Framed
from cascade.data.tars.index import counted
from cascade.data.tars.open_tar import Placed
from cascade.data.tars.tar import Paths
from cascade.data.transforms import BadSample, Pictures
from cascade.errors import UserError
from cascade.files.stores.cache import GB
from cascade.files.stores.places import Place

log = logging.getLogger(__name__)

CACHE_BYTES = 2 * 2**30


class Shards(Dataset):
    """The samples of a folder of shards, indexed by sample number n = 0, 1, 2, ... without end.

    These are `Samples`. An item has `sample`, `key` ("shard/key"), `caption`, the `image_{size}` of
    `pictures`, the rows of `embeddings`, the `json_fields`, and `skipped`: the bad samples that it
    replaces.

    Args:
        path: a folder, a glob, or a list of tars, on a disk or in a store (s3://BUCKET/FOLDER).
        pictures: sizes, crop and degradation.
        split, keys, hold_out: see `Corpus`.
        captions: the rate at which each caption field ("txt", or a field of the JSON) is used. A
            sample that lacks some fields draws from the others. None: the `txt`.
        seed: of the order, the crops and the captions.
        shuffle: whether each epoch has its own random order; False keeps the order of the tars.
        block: how many tars are shuffled together, and are open at a time.
        embeddings: precomputed folders, by name so that a configuration can override one.
        json_fields: further fields of the JSON to copy into the items; None where missing.
        cache: keep the decoded pictures in memory, shared by forked workers, if all of them fit
            into `CACHE_BYTES`.
        max_skip_fraction: the greatest fraction of samples that may be left out of the order, and
            that may turn out bad in training.
        several: which captions of a list in the JSON, or of several lines of a `txt`, are used:
            "first", "drawn" (one for each sample number), or "all" joined into one. None: a `txt`
            is one caption, however many lines it has, and a list is ignored.
        index, cache_gb: see `Corpus`.
        recaptions: folder of captions that a captioner wrote (`cascade data caption`), which take
            the place of those of the JSON in the same field. If there is no such folder, the JSON's
            are used.
        buckets: frame pictures in shapes of several aspect ratios, one to a batch (`BucketOrder`);
            items then have `FRAMING`. The tars need an index, and all of it is read at the start:
            None: pictures are the centred squares.

    Attributes:
        skipped: how many samples were left out of the order, by reason.

    Raises:
        UserError: no tars, no usable sample in them, too many left out, tars that changed since
            they were indexed, embeddings or captions that lack a tar, an index without the sides
            that buckets need, or pictures that buckets cannot be made of.
    """

    def __init__(
        self,
        path: Paths,
        pictures: Pictures,
        split: str = "train",
        captions: Mapping[str, float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        block: int = 64,
        embeddings: Mapping[str, Embeddings] | None = None,
        json_fields: Sequence[str] = (),
        cache: bool = False,
        max_skip_fraction: float = 0.01,
        keys: str | None = None,
        hold_out: float | None = None,
        several: str | None = None,
        index: str | Place | None = None,
        cache_gb: float | int = GB,
        recaptions: str | Place | None = None,
        buckets: Buckets | None = None,
    ):
        self.make_item = Items(
            pictures, captions, embeddings, json_fields, seed, several, recaptions
        )
        self.embeddings, self.max_skip_fraction = self.make_item.stores, max_skip_fraction
        members = {"txt" if field == "txt" else "json" for field in self.make_item.captions}
        if buckets and cache:
            raise UserError("data.cache keeps square pictures: leave it or data.buckets out")
        if block < 1:
            raise UserError(f"data.block={block}: shuffle at least 1 tar at a time")
        self.corpus = Corpus(path, split, members, block, keys, hold_out, index, cache_gb)
        self.held_out = self.corpus.share
        self.buckets = buckets and Framed.of_corpus(buckets, self.corpus, pictures)
        self.order = (
            BucketOrder(self.buckets.labels, seed, block, shuffle, buckets.batch)
            if self.buckets
            else Order(self.corpus.counts, seed, block, shuffle)
        )
        self.skipped = self.corpus.left_out
        left_out = self.skipped.total()
        whole = left_out + self.corpus.usable
        if left_out > max(1, max_skip_fraction * whole):
            raise UserError(
                f"{path}: {left_out} of {whole} samples are left out ({self.corpus.lost}), over "
                f"{max_skip_fraction:.1%}: repair the shards, or allow more with "
                "+data.max_skip_fraction=..."
            )
        for store in self.embeddings:
            store.require([tar.stem for tar in self.corpus.paths])
        self._fetched = (0, 0)  # the sample numbers of the block that is being fetched
        self._cache = _cache(self.corpus.counts, pictures.largest) if cache else None

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.order)

    @property
    def samples_per_epoch(self) -> int:
        return len(self)

    @property
    def alike(self) -> int:
        return self.buckets.of.batch if self.buckets else 0

    def __getitem__(self, n: int) -> dict[str, Any]:
        self._fetch_ahead(n)
        skipped = []
        for tar, place in islice(self.order.places(n), MAX_BAD_IN_A_ROW):
            try:
                return {**self.item(tar, place, n), "skipped": skipped}
            except BadSample as reason:
                opened = self.corpus[tar]
                skipped.append(Skip(n, f"{opened.shard}/{opened.key(place)}", str(reason)))
        reasons = counted(skip.reason for skip in skipped)
        raise UserError(f"all samples are bad from {skipped[0].key} on ({reasons}): check them")

    def _fetch_ahead(self, n: int) -> None:
        """Where tars are in a store, begin to fetch the block of sample n, and the next one."""
        first, end = self._fetched
        if self.corpus.is_remote and not first <= n < end:
            self._fetched, tars = self.order.ahead(n)
            self.corpus.fetch_ahead(tars)

    def items(
        self, numbers: Iterable[int], part: int = 0, parts: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the item of each sample number, whichever process asks for it."""
        return map(self.__getitem__, numbers)

    def preview(self, count: int, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield `count` evenly spaced items of the first epoch, with whole pictures of `sizes`."""
        other = copy(self)
        other.make_item, other._cache, other.buckets = copy(self.make_item), None, None
        other.make_item.pictures = Pictures(tuple(sizes))
        return (other[n * len(self) // count] for n in range(count))

    def check(self, batch: int) -> None:
        """Check the tars' permissions and read some samples (`preflight`). Raises UserError."""
        preflight(self.corpus, self.make_item, batch)

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the tars and, with the seed, their order."""
        corpus = self.corpus
        return {"shards": corpus.fingerprint, "content": corpus.identity, "held_out": corpus.share}

    def item(self, tar: int, place: int, n: int) -> dict[str, Any]:
        """Return a sample of the corpus under number n. Raises BadSample if it cannot be used."""
        sample = Placed(self.corpus[tar], place)
        cached = None if self._cache is None else partial(self._picture, tar, sample)
        return self.make_item(sample, n, cached, self.buckets and self.buckets.bucket(tar, place))

    def _picture(self, tar: int, sample: Placed) -> UInt8[np.ndarray, "s s 3"]:
        pixels, filled, starts = self._cache
        at = starts[tar] + sample.place
        if not filled[at]:
            pixels[at] = self.make_item.decoded(sample)
            filled[at] = True  # last: another worker may read the cache at the same time
        return pixels[at]


def _cache(
    counts: Sequence[int], size: int
) -> tuple[UInt8[np.ndarray, "n s s 3"], Bool[np.ndarray, " n"], Int64[np.ndarray, " t"]] | None:
    """Allocate the cache: pixels, whether each picture is filled in, and each tar's first index.

    None if the items have no pictures, or too many to keep.
    """
    n = sum(counts)
    room = n * size * size * 3
    if room > CACHE_BYTES:
        log.warning("cache: %d pictures of %d px need %.1f GiB; off", n, size, room / 2**30)
    if not 0 < room <= CACHE_BYTES:
        return None
    # Anonymous shared memory: forked workers fill and read one cache together.
    pixels = np.frombuffer(mmap.mmap(-1, room), np.uint8).reshape(n, size, size, 3)
    filled = np.frombuffer(mmap.mmap(-1, n), np.bool_)
    return pixels, filled, np.cumsum([0, *counts[:-1]], dtype=np.int64)
