"""The order of samples: a pure function of (seed, epoch), shuffled within blocks of tars.

Sample n is place n mod N of epoch n div N. Each epoch deals the tars anew into blocks of `block`,
and the samples of a block come in random order before those of the next, so that few tars are open
at a time. Neither ranks nor workers nor the batch have a part in it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from cascade.draws import generator


class Order:
    """Which sample comes when.

    Args:
        counts: of the samples of each tar.
        seed: of the permutations.
        block: how many tars are shuffled together.
        shuffle: whether there is an order of each epoch's own; otherwise that of the tars.
    """

    def __init__(self, counts: Sequence[int], seed: int, block: int, shuffle: bool):
        self.counts = np.array(counts, np.int64)
        self.seed, self.block, self.shuffle = seed, block, shuffle
        self.blocks = -(-len(counts) // block)
        self._epoch: tuple[int, list[Int64[np.ndarray, " t"]], Int64[np.ndarray, " b"]] | None = (
            None
        )
        self._block: tuple[int, Int64[np.ndarray, " m"], Int64[np.ndarray, " t"]] | None = None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.counts.sum())

    def places(self, n: int) -> Iterator[tuple[int, int]]:
        """(tar, place in it) of sample n, then of those to take if it is bad, its block's once."""
        epoch, place = divmod(n, len(self))
        dealt, ends = self._dealt(epoch)
        b = int(np.searchsorted(ends, place, side="right"))
        order, starts = self._shuffled(epoch, b)
        first = place - (int(ends[b]) - len(order))
        for i in range(len(order)):
            at = int(order[(first + i) % len(order)])
            t = int(np.searchsorted(starts, at, side="right")) - 1
            yield int(dealt[b][t]), at - int(starts[t])

    def _dealt(self, epoch: int) -> tuple[list[Int64[np.ndarray, " t"]], Int64[np.ndarray, " b"]]:
        """The tars of each block, and where in the epoch it ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            tars = np.arange(len(self.counts))
            if self.shuffle and self.blocks > 1:
                tars = generator(self.seed, "shards", epoch).permutation(tars)
            # Within a block in their own order: a folder of one block needs no dealing.
            dealt = [np.sort(tars[i : i + self.block]) for i in range(0, len(tars), self.block)]
            ends = np.cumsum([self.counts[block].sum() for block in dealt])
            self._epoch = epoch, dealt, ends
        return self._epoch[1:]

    def _shuffled(
        self, epoch: int, b: int
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " t"]]:
        """The order of a block's samples, and with which of them each of its tars starts."""
        number = epoch * self.blocks + b
        if self._block is None or self._block[0] != number:
            counts = self.counts[self._dealt(epoch)[0][b]]
            samples = int(counts.sum())
            rng = generator(self.seed, "order", number)
            order = rng.permutation(samples) if self.shuffle else np.arange(samples)
            self._block = number, order, np.cumsum(counts) - counts
        return self._block[1:]
