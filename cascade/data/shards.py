"""Training samples from WebDataset tars: the sample number alone says what is read.

Neither batch, rank nor the number of workers has a part in it, so that a run that goes on needs one
integer. What is joined to a sample is joined by (shard, key), never by row. A bad sample is
replaced by the next good one of its block, and named. Nothing here unpickles: shards yield bytes,
JSON and safetensors.
"""

import logging
import mmap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cascade.conditioning import Batch
from cascade.data.corpus import Corpus, Placed
from cascade.data.embeddings import Embeddings, padded
from cascade.data.index import counted
from cascade.data.items import Items
from cascade.data.order import Order
from cascade.data.tar import Paths
from cascade.data.transforms import BadSample, Pictures
from cascade.errors import UserError

log = logging.getLogger(__name__)

CACHE_BYTES = 2 * 2**30
PATIENCE = 1000  # bad samples in a row, and nobody waits for a good one


class Skip(NamedTuple):
    """A bad sample ("shard/key") that was met on the way to the item of number `sample`."""

    sample: int
    key: str
    reason: str


class Shards(Dataset):
    """The samples of a folder of shards, indexed by sample number n = 0, 1, 2, ... without end.

    An item has `sample`, `key` ("shard/key"), `caption`, the `image_{size}` of `pictures`, the
    rows of `embeddings`, the `json_fields`, and `skipped`: the bad samples in whose place it
    stands. The attribute `skipped` counts those that were never in the order.

    Args:
        path: a folder, a glob, or a list of tars.
        pictures: which sizes, and which crop.
        split, keys, hold_out: see `Corpus`.
        captions: caption fields, "txt" or a field of the JSON, and how often each is taken. A
            sample that lacks some of them is captioned by the others. None: the `txt`.
        seed: of the order, the crops and the captions.
        shuffle: whether each epoch has an order of its own; otherwise that of the tars.
        block: how many tars are shuffled together, and open at a time.
        embeddings: precomputed folders; their names are there for a configuration to override.
        json_fields: what else of the JSON the items carry, as it is; None where it is missing.
        cache: whether to keep the decoded pictures in memory, if all fit into `CACHE_BYTES`;
            forked workers share them.
        max_skip_fraction: of all samples, how many may be left out, and in training be bad.
        several: of a list of captions in the JSON, or of several lines of a `txt`: "first", "drawn"
            (one for each sample number), or "all" as one. None: a `txt` is one caption, whatever
            lines it has, and a list is none.

    Raises:
        UserError: no tars, no usable sample in them, too many left out, tars that are not as they
            were indexed, or embeddings that lack a tar.
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
    ):
        self.make_item = Items(pictures, captions, embeddings, json_fields, seed, several)
        self.embeddings, self.max_skip_fraction = self.make_item.embeddings, max_skip_fraction
        members = {"txt" if field == "txt" else "json" for field in self.make_item.captions}
        if block < 1:
            raise UserError(f"data.block={block}: shuffle at least 1 tar at a time")
        self.corpus = Corpus(path, split, members, block, keys, hold_out)
        self.order = Order(self.corpus.counts, seed, block, shuffle)
        self.skipped = self.corpus.left_out
        self._check_left_out(path)
        for store in self.embeddings:
            store.require([tar.stem for tar in self.corpus.paths])
        self._cache = _cache(self.corpus.counts, pictures.largest) if cache else None

    def _check_left_out(self, path: Paths) -> None:
        left_out, share = self.skipped.total(), self.max_skip_fraction
        whole = left_out + self.corpus.usable
        if left_out > max(1, share * whole):
            raise UserError(
                f"{path}: {left_out} of {whole} samples are left out ({self.corpus.lost}), over "
                f"{share:.1%}: mend the shards, or allow more with +data.max_skip_fraction=..."
            )

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.order)

    def __getitem__(self, n: int) -> dict[str, Any]:
        skipped = []
        for tar, place in islice(self.order.places(n), PATIENCE):
            try:
                return {**self.item(tar, place, n), "skipped": skipped}
            except BadSample as reason:
                opened = self.corpus[tar]
                skipped.append(Skip(n, f"{opened.shard}/{opened.key(place)}", str(reason)))
        reasons = counted(Counter(skip.reason for skip in skipped))
        raise UserError(f"all samples are bad from {skipped[0].key} on ({reasons}): check them")

    def showing(self, sizes: Sequence[int]) -> "Shards":
        """The same samples with whole pictures of other sizes."""
        other = copy(self)
        other.make_item, other._cache = copy(self.make_item), None
        other.make_item.pictures = Pictures(tuple(sizes))
        return other

    def item(self, tar: int, place: int, n: int) -> dict[str, Any]:
        """A sample of the corpus as number n shows it. Raises BadSample if it cannot be used."""
        sample = Placed(self.corpus[tar], place)
        at_hand = None if self._cache is None else partial(self._picture, tar, sample)
        return self.make_item(sample, n, at_hand)

    def _picture(self, tar: int, sample: Placed) -> UInt8[np.ndarray, "s s 3"]:
        pixels, filled, starts = self._cache
        at = starts[tar] + sample.place
        if not filled[at]:
            pixels[at] = self.make_item.decoded(sample)
            filled[at] = True  # last, as another worker may be looking
        return pixels[at]


def _cache(
    counts: Sequence[int], size: int
) -> tuple[UInt8[np.ndarray, "n s s 3"], Bool[np.ndarray, " n"], Int64[np.ndarray, " t"]] | None:
    """Room for all pictures, whether each is there yet, and where those of each tar start.

    None if there are none to keep, or too many.
    """
    n = sum(counts)
    room = n * size * size * 3
    if room > CACHE_BYTES:
        log.warning("cache: %d pictures of %d px take %.1f GiB; not kept", n, size, room / 2**30)
        return None
    if not room:
        return None
    # Anonymous and shared: forked workers fill one cache between them.
    pixels = np.frombuffer(mmap.mmap(-1, room), np.uint8).reshape(n, size, size, 3)
    filled = np.frombuffer(mmap.mmap(-1, n), np.bool_)
    return pixels, filled, np.cumsum([0, *counts[:-1]], dtype=np.int64)


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Tensors stacked, `sample` an int64 tensor, `skipped` one list, the rest lists of values.

    `text` may be longer in one item than in another: it is padded, and `text_mask` joins it.
    """
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if not isinstance(first, Tensor):
            batch[key] = values
        elif key == "text":
            batch |= padded(values)
        else:
            batch[key] = torch.stack(values)
    batch["sample"] = torch.tensor(batch["sample"])
    batch["skipped"] = [skip for skipped in batch["skipped"] for skip in skipped]
    return batch


def put_rows(whole: dict[str, Tensor], part: Mapping[str, Tensor], start: int, count: int) -> None:
    """Puts rows into tensors of `count` rows, made on first use: no picture is held twice."""
    for key, rows in part.items():
        if key not in whole:
            whole[key] = rows.new_empty((count, *rows.shape[1:]))
        whole[key][start : start + len(rows)] = rows


class SampleNumbers(Sampler[list[int]]):
    """The batches of a rank: batch k has the numbers start + (k world + rank) batch + 0, 1, ...

    So the k-th batches of all ranks together are one block of the same global order for any world
    size. `batches=None`: without end, and without a length.
    """

    def __init__(
        self, batch: int, rank: int = 0, world: int = 1, start: int = 0, batches: int | None = None
    ):
        self.batch, self.batches = batch, batches
        self.first, self.stride = start + rank * batch, world * batch

    def __iter__(self) -> Iterator[list[int]]:
        for k in count() if self.batches is None else range(self.batches):
            first = self.first + k * self.stride
            yield list(range(first, first + self.batch))

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("endless")
        return self.batches


class Loader(DataLoader):
    """A DataLoader that counts the seconds that its batches were waited for, in `waited`."""

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begun = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - begun
            yield batch


def loader(
    shards: Shards,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    batches: int | None = None,
    workers: int = 0,
) -> Loader:
    """Collated batches of `batch` samples for one rank, from global sample number `start` on."""
    return Loader(
        shards,
        batch_sampler=SampleNumbers(batch, rank, world, start, batches),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
