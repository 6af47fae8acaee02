"""Decoding large latents in overlapping tiles, so that memory does not grow with the picture."""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor


def tiled(
    decode: Callable[[Tensor], Tensor], z: Float[Tensor, "b c h w"], tile: int, overlap: int
) -> Float[Tensor, "b d H W"]:
    """Decodes tiles and blends them linearly where they overlap.

    Args:
        decode: maps latents to pictures that are a whole number of times as large.
        tile: side of a tile, in latents; no side of z may be smaller on its own account.
        overlap: of adjacent tiles, in latents, at least.
    """
    total = weights = z.new_zeros(())
    for rows, columns in product(*(list(spans(n, tile, overlap)) for n in z.shape[2:])):
        picture = decode(z[:, :, rows, columns])
        factor = picture.shape[2] // (rows.stop - rows.start)
        if not total.ndim:
            sides = [n * factor for n in z.shape[2:]]
            total = picture.new_zeros(*picture.shape[:2], *sides)
            weights = picture.new_zeros(sides)
        ramps = [_ramp(span, n, overlap, factor) for span, n in zip((rows, columns), z.shape[2:])]
        weight = torch.outer(*ramps).to(picture)
        place = [slice(span.start * factor, span.stop * factor) for span in (rows, columns)]
        total[:, :, place[0], place[1]] += picture * weight
        weights[place[0], place[1]] += weight
    return total.div_(weights)


def spans(side: int, tile: int, overlap: int) -> Iterator[slice]:
    """Spans of `tile` positions that cover a side, each overlapping the one before it."""
    start = 0
    while start + tile < side:
        yield slice(start, start + tile)
        start += tile - overlap
    yield slice(max(0, side - tile), side)


def _ramp(span: slice, side: int, overlap: int, factor: int) -> Float[Tensor, " n"]:
    """Weights that fall towards the ends of a span, but not at those of the picture."""
    inside = torch.arange(factor * (span.stop - span.start)) + 0.5
    width = factor * overlap + 1.0
    low = inside / width if span.start > 0 else torch.ones_like(inside)
    high = inside.flip(0) / width if span.stop < side else torch.ones_like(inside)
    return torch.minimum(low, high).clamp(max=1)
