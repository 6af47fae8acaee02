"""The order of samples: a pure function of (seed, epoch), shuffled within blocks of tars.

Sample n is at place n mod N of epoch n div N. Each epoch redistributes the tars over blocks of
`block` tars, and reads the samples of one block in random order before those of the next, so that
few tars are open at a time. The order depends on neither ranks nor workers nor batch size.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from jaxtyping import Int64

from cascade.draws import generator

Places = Int64[np.ndarray, "_"]


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

    def __init__(self, counts: Sequence[int], seed: int, block: int, shuffle: bool):
        self.counts = np.array(counts, np.int64)
        self.seed, self.block, self.shuffle = seed, block, shuffle
        self.blocks = -(-len(counts) // block)
        self._epoch: tuple[int, list[Places], Places] | None = None
        self._block: tuple[int, Places, Places] | None = None

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
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, *self._deal(epoch)
        return self._epoch[1:]

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
        if self._block is None or self._block[0] != number:
            counts = self.counts[self._dealt(epoch)[0][b]]
            samples = int(counts.sum())
            rng = generator(self.seed, "order", number)
            order = rng.permutation(samples) if self.shuffle else np.arange(samples)
            self._block = number, order, np.cumsum(counts) - counts
        return self._block[1:]
