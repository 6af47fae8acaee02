"""Batches of training samples: one loader for indexed shards and for streams.

Both implement `Samples`, so that callers need not know which one they were given.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cascade.batch import Batch
from cascade.data.embeddings import Embeddings, padded
from cascade.data.items import Items
from cascade.data.order import sample_numbers


@runtime_checkable
class Samples(Protocol):
    """A source of training samples: `Shards` or `Stream`.

    Attributes:
        make_item: turns a sample that was read into an item.
        embeddings: the precomputed folders that items are joined with.
        max_skip_fraction: the greatest fraction of bad samples that training tolerates.
        samples_per_epoch: infinite for a stream.
        held_out: the fraction of the pictures of these tars that an index holds out.
        alike: how many samples, from each multiple of it on, have pictures of one shape; 0: all.
    """

    make_item: Items
    embeddings: Sequence[Embeddings]
    max_skip_fraction: float
    samples_per_epoch: float
    held_out: float

    @property
    def alike(self) -> int: ...

    def items(
        self, numbers: Iterable[int], part: int = 0, parts: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the item of each sample number.

        Args:
            part, parts: which of all the processes that read at the same time this one is.
            start: the sample number that the run started from.
        """

    def preview(self, count: int, sizes: Sequence[int]) -> Iterable[dict[str, Any]]:
        """Return a few evenly spaced items with whole pictures of `sizes`; a stream has none."""

    def check(self, batch: int) -> None:
        """Raise UserError if training with a global `batch` would fail on these samples."""

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the samples and their order: "shards", "content", "held_out"."""


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Stack tensors; make `sample` an int64 tensor, `skipped` one list, other values lists.

    The items' `text` may differ in length: it is padded, and `text_mask` is added.
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


def on(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def chosen(batch: Batch, rows: Tensor) -> Batch:
    """Select some rows (bool [b]) of a batch's tensors and captions; `empty` holds for any."""
    some: Batch = {k: v[rows] for k, v in batch.items() if isinstance(v, Tensor)}
    some["caption"] = [one for one, row in zip(batch["caption"], rows) if row]
    return some | ({"empty": batch["empty"]} if "empty" in batch else {})


def put_rows(whole: dict[str, Tensor], part: Mapping[str, Tensor], start: int, count: int) -> None:
    """Copy the rows of `part` into tensors of `count` rows, from row `start` on.

    The tensors are allocated once, on first use: concatenating batches would hold each row twice.
    """
    for key, rows in part.items():
        if key not in whole:
            whole[key] = rows.new_empty((count, *rows.shape[1:]))
        whole[key][start : start + len(rows)] = rows


class Loader(DataLoader):
    """A DataLoader that measures, in `waited`, the seconds that its consumer waited for batches."""

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
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
    samples: Samples,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    batches: int | None = None,
    workers: int = 0,
) -> Loader:
    """Load collated batches of `batch` samples for one rank, from global sample `start` on.

    Args:
        batches: how many; None: without end.
        workers: processes that read and decode.
    """
    return Loader(
        _RankItems(samples, batch, rank, world, start, batches),
        batch_size=batch,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class _RankItems(IterableDataset):
    """The items of one rank. The DataLoader takes a batch from each of its workers in turn."""

    samples: Samples
    batch: int
    rank: int
    world: int
    start: int
    batches: int | None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        w, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = sample_numbers(self.batch, self.rank, self.world, self.start, self.batches)
        # Worker w of W makes the rank's batches w, w + W, ...: read in turn, they are in order.
        mine = chain.from_iterable(islice(numbers, w, None, workers))
        part = self.rank * workers + w
        return iter(self.samples.items(mine, part, self.world * workers, self.start))
