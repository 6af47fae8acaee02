"""Samples of a few pictures of one thing, for personalization (DreamBooth, 2208.12242)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from cascade.data.shards import Shards
from cascade.errors import UserError


class Few:
    """A few pictures, so that one may be in a batch more than once; perhaps with those of a class.

    With a class, samples of even numbers are of the thing and those of odd ones of its class, half
    of a batch each: these are `preserved`. Their `loss_weight` makes of a batch's mean the sum of
    the two halves' means, the second one times `weight` (prior preservation, equation 2 of the
    paper). These are `Samples`.

    Args:
        own: of the thing.
        kept: of its class; None: nothing is preserved.
        weight: of the class's half.

    Raises:
        UserError: with a class, and pictures of several shapes.
    """

    def __init__(self, own: Shards, kept: Shards | None = None, weight: float = 1.0):
        self.own, self.kept, self.weight = own, kept, weight
        self.make_item, self.embeddings = own.make_item, own.embeddings
        self.max_skip_fraction, self.held_out = own.max_skip_fraction, own.held_out
        self.samples_per_epoch, self.alike = own.samples_per_epoch, own.alike
        if kept and (own.alike or kept.alike):
            raise UserError(
                "with pictures of a class, all pictures are squares: leave data.buckets out, or "
                "set preserve=0"
            )

    def items(
        self, numbers: Iterable[int], part: int = 0, parts: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the item of each sample number, whichever process asks for it."""
        return map(self._item, numbers)

    def _item(self, n: int) -> dict[str, Any]:
        if self.kept is None:
            return self.own[n]
        half, of_class = divmod(n, 2)
        item = (self.kept if of_class else self.own)[half]
        weight = 2.0 * (self.weight if of_class else 1.0)
        kept = {"preserved": torch.tensor(bool(of_class)), "loss_weight": torch.tensor(weight)}
        return {**item, **kept, "sample": n}

    def preview(self, count: int, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield items of the thing, with whole pictures of `sizes`."""
        return self.own.preview(count, sizes)

    def check(self, batch: int) -> None:
        """Raise UserError if training on these samples would fail."""
        for shards in (self.own, self.kept):
            if shards is not None:
                shards.check(min(batch, len(shards)))

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the samples and their order; of a class, too."""
        own = self.own.provenance()
        return own if self.kept is None else {**own, "class": self.kept.provenance()["shards"]}
