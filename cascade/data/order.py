"""The order of samples: a pure function of (seed, epoch), shuffled within blocks of tars.

Sample n is at place n mod N of epoch n div N. Each epoch redistributes the tars over blocks of
`block` tars, and reads the samples of one block in random order before those of the next, so that
few tars are open at a time. The order depends on neither ranks nor workers nor batch size.

`BucketOrder` is the one in which each batch is of one bucket of pictures, and which so depends on
the global batch size, but on neither ranks nor workers nor micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, Integer

from cascade.draws import generator

Places = Int64[np.ndarray, "_"]
T = TypeVar("T")


def sample_numbers(
    batch: int, rank: int = 0, world: int = 1, start: int = 0, batches: int | None = None
) -> Iterator[list[int]]:
    """Yield the sample numbers of each batch of a rank.

    Batch k begins at start + (k world + rank) batch.

    So the k-th batches of all ranks together cover one contiguous range of sample numbers, the same
    one for any number of ranks. With `batches=None` they never end.
    """
    for k in count() if batches is None else range(batches):
        first = start + (k * world + rank) * batch
        yield list(range(first, first + batch))


class Order:
    """Maps sample numbers to places in tars.

    Args:
        counts: the number of samples in each tar.
        seed: of the permutations.
        block: how many tars are shuffled together.
        shuffle: whether each epoch has its own random order; False keeps the order of the tars.
    """

    keeps = 1  # permutations of epochs and of blocks that are kept

    def __init__(self, counts: Sequence[int], seed: int, block: int, shuffle: bool):
        self.counts = np.array(counts, np.int64)
        self.seed, self.block, self.shuffle = seed, block, shuffle
        self.blocks = -(-len(counts) // block)
        self._epochs: dict[int, tuple[list[Places], Places]] = {}
        self._blocks: dict[int, tuple[Places, Places]] = {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.counts.sum())

    def places(self, n: int) -> Iterator[tuple[int, int]]:
        """Yield (tar, place in it) of sample n, then the replacements to try if it is bad.

        Replacements are the samples that follow in the same block, wrapping around, each once.
        """
        epoch, place = divmod(n, len(self))
        dealt, ends = self._dealt(epoch)
        b = int(np.searchsorted(ends, place, side="right"))
        order, starts = self._shuffled(epoch, b)
        first = place - (int(ends[b]) - len(order))
        for i in range(len(order)):
            at = int(order[(first + i) % len(order)])
            t = int(np.searchsorted(starts, at, side="right")) - 1
            yield int(dealt[b][t]), at - int(starts[t])

    def ahead(self, n: int) -> tuple[tuple[int, int], list[int]]:
        """Return the first and end number of sample n's block, and its tars and the next's."""
        epoch, place = divmod(n, len(self))
        dealt, ends = self._dealt(epoch)
        b = int(np.searchsorted(ends, place, side="right"))
        end = epoch * len(self) + int(ends[b])
        later, after = divmod(epoch * self.blocks + b + 1, self.blocks)
        now, then = dealt[b], (dealt if later == epoch else self._deal(later)[0])[after]
        return (end - int(self.counts[now].sum()), end), [*now.tolist(), *then.tolist()]

    def _dealt(self, epoch: int) -> tuple[list[Places], Places]:
        """Return the tars of each block, and the place in the epoch where it ends."""
        return _kept(self._epochs, epoch, lambda: self._deal(epoch), self.keeps)

    def _deal(self, epoch: int) -> tuple[list[Places], Places]:
        tars = np.arange(len(self.counts))
        if self.shuffle and self.blocks > 1:
            tars = generator(self.seed, "shards", epoch).permutation(tars)
        # Sorted within a block, which is why a single block needs no permutation above.
        dealt = [np.sort(tars[i : i + self.block]) for i in range(0, len(tars), self.block)]
        return dealt, np.cumsum([self.counts[block].sum() for block in dealt])

    def _shuffled(self, epoch: int, b: int) -> tuple[Places, Places]:
        """Return the order of a block's samples, and the index at which each of its tars starts."""
        number = epoch * self.blocks + b
        return _kept(self._blocks, number, lambda: self._shuffle(epoch, b), self.keeps)

    def _shuffle(self, epoch: int, b: int) -> tuple[Places, Places]:
        counts = self.counts[self._dealt(epoch)[0][b]]
        samples = int(counts.sum())
        rng = generator(self.seed, "order", epoch * self.blocks + b)
        order = rng.permutation(samples) if self.shuffle else np.arange(samples)
        return order, np.cumsum(counts) - counts


class BucketOrder(Order):
    """The order in which each batch is of one bucket, and in which no sample is lost.

    A bucket has a sequence without end: its samples in each block, in the order that `Order` gives
    them, block after block and epoch after epoch. The sequence is cut to batches, so what does not
    fill one is carried on: to the next block, or, of at most a batch less one for each bucket, to
    the next epoch. A batch comes in the block that completes it, and the batches of a block come in
    random order.

    Args:
        labels: the bucket of each sample of each tar. Each bucket has none or at least a batch.
        seed, block, shuffle: as of `Order`.
        batch: samples of a batch; batch k has the sample numbers from k * batch on.
    """

    keeps = 4  # a batch may begin in a block before its own, or in the epoch before

    def __init__(
        self,
        labels: Sequence[Integer[np.ndarray, "_"]],
        seed: int,
        block: int,
        shuffle: bool,
        batch: int,
    ):
        super().__init__([len(of) for of in labels], seed, block, shuffle)
        self.labels, self.batch = labels, batch
        kinds = 1 + max((int(of.max()) for of in labels if len(of)), default=0)
        self.held = np.stack([np.bincount(of, minlength=kinds) for of in labels])
        self.totals = self.held.sum(0)
        self._counted: dict[int, Int64[np.ndarray, "_ _"]] = {}
        self._planned: dict[int, tuple[Places, Places]] = {}
        self._grouped: dict[int, list[Places]] = {}

    def bucket(self, n: int) -> int:
        """Return the bucket of the batch of sample n."""
        return self._batch(n // self.batch)[0]

    def places(self, n: int) -> Iterator[tuple[int, int]]:
        """Yield (tar, place in it) of sample n, then the replacements to try if it is bad.

        Replacements are the samples that follow in the same bucket's epoch, wrapping around, each
        once.
        """
        step, row = divmod(n, self.batch)
        bucket, number = self._batch(step)
        total = int(self.totals[bucket])
        epoch, first = divmod(number * self.batch + row, total)
        for i in range(total):
            yield self._member(epoch, bucket, (first + i) % total)

    def ahead(self, n: int) -> tuple[tuple[int, int], list[int]]:
        """Return the first and end number of sample n's block, and its tars and the next's."""
        epoch, b = self._block_of(n // self.batch)
        done = self._seen(epoch)[b : b + 2] // self.batch
        first, end = (self.batch * int(numbers.sum()) for numbers in done)
        later = divmod(epoch * self.blocks + b + 1, self.blocks)
        return (first, end), [*self._tars(epoch, b), *self._tars(*later)]

    def _tars(self, epoch: int, b: int) -> list[int]:
        return self._dealt(epoch)[0][b].tolist()

    def _block_of(self, step: int) -> tuple[int, int]:
        """Return the epoch and the block in which a batch comes."""
        epoch = step * self.batch // len(self)  # or a later one, as some samples are carried on
        while int(((epoch + 1) * self.totals // self.batch).sum()) <= step:
            epoch += 1
        done = (self._seen(epoch) // self.batch).sum(1)
        return epoch, int(np.searchsorted(done, step, side="right")) - 1

    def _seen(self, epoch: int) -> Int64[np.ndarray, "_ _"]:
        """Return how many samples each bucket [.., k] has had before each block and at the end."""

        def count() -> Int64[np.ndarray, "_ _"]:
            held = [self.held[tars].sum(0) for tars in self._dealt(epoch)[0]]
            return epoch * self.totals + np.cumsum([np.zeros_like(self.totals), *held], 0)

        return _kept(self._counted, epoch, count, self.keeps)

    def _batch(self, step: int) -> tuple[int, int]:
        """Return the bucket of a batch, and its number among those of the bucket."""
        epoch, b = self._block_of(step)
        done = self._seen(epoch)[b : b + 2] // self.batch

        def plan() -> tuple[Places, Places]:
            more = done[1] - done[0]
            kinds = np.repeat(np.arange(len(more)), more)
            numbers = np.concatenate([np.arange(*pair) for pair in done.T])
            if not self.shuffle:
                return kinds, numbers
            order = generator(self.seed, "batches", epoch * self.blocks + b).permutation(len(kinds))
            return kinds[order], numbers[order]

        kinds, numbers = _kept(self._planned, epoch * self.blocks + b, plan, self.keeps)
        i = step - int(done[0].sum())
        return int(kinds[i]), int(numbers[i])

    def _member(self, epoch: int, bucket: int, place: int) -> tuple[int, int]:
        """Return (tar, place in it) of the sample at a place of a bucket's epoch."""
        seen = self._seen(epoch)[:, bucket] - epoch * int(self.totals[bucket])
        b = int(np.searchsorted(seen, place, side="right")) - 1
        tars, (order, starts) = self._dealt(epoch)[0][b], self._shuffled(epoch, b)

        def group() -> list[Places]:
            labels = np.concatenate([self.labels[tar] for tar in tars])[order]
            return [order[labels == kind] for kind in range(len(self.totals))]

        number = epoch * self.blocks + b
        at = int(_kept(self._grouped, number, group, self.keeps)[bucket][place - int(seen[b])])
        t = int(np.searchsorted(starts, at, side="right")) - 1
        return int(tars[t]), at - int(starts[t])


def _kept(made: dict[int, T], number: int, make: Callable[[], T], most: int) -> T:
    """Return `made[number]`, which `make` makes if need be; `made` keeps the `most` newest."""
    if number not in made:
        found = make()
        while len(made) >= most:
            del made[next(iter(made))]
        made[number] = found
    return made[number]
