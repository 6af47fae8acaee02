"""Aspect-ratio buckets: the shapes that pictures are trained and painted in (SDXL, section 2.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int64

from cascade.errors import UserError

Shape = tuple[int, int]  # height and width


def shapes(size: int, multiple: int, widest: float) -> list[Shape]:
    """List heights and widths of about size * size pixels, from the widest to the tallest.

    For each side, a multiple of `multiple`, the other is the nearest multiple of it that gives that
    area, in portrait and in landscape.
    """
    found = {(size, size)}
    for side in range(multiple, size + 1, multiple):
        other = multiple * max(1, round(size * size / (side * multiple)))
        if max(side, other) <= widest * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda shape: shape[0] / shape[1])


@dataclass(frozen=True)
class Buckets:
    """Shapes of about equal area; a picture belongs to the one of nearest aspect ratio.

    Args:
        size: side in pixels of the square one. Other sizes of a picture are scaled alike.
        batch: the run's global batch size; each batch is of one bucket.
        multiple: what the sides are multiples of, such as the network's `divisor`.
        widest: the greatest aspect ratio, of the longer side to the shorter.
        crop: where a resized picture that is longer than its bucket is cut.

    Raises:
        UserError: the square is no multiple of `multiple`, or a number is out of range.
    """

    size: int
    batch: int
    multiple: int = 8
    widest: float = 2.0
    crop: Literal["random", "centre"] = "random"

    def __post_init__(self):
        if min(self.size, self.batch, self.multiple) < 1 or self.size % self.multiple:
            raise UserError(
                f"buckets: size={self.size} is no multiple of multiple={self.multiple}: change one"
            )
        if self.widest < 1:
            raise UserError(f"buckets.widest={self.widest}: choose 1 or more, such as 2 for 2:1")
        if self.crop not in ("random", "centre"):
            raise UserError(f"buckets.crop={self.crop}: choose random or centre")

    @cached_property
    def shapes(self) -> list[Shape]:
        """The height and width of each bucket, from the widest to the tallest."""
        return shapes(self.size, self.multiple, self.widest)

    def at(self, size: int) -> list[Shape]:
        """The buckets' shapes where the square one has another side.

        Raises:
            UserError: they are no whole pixels there.
        """
        if any(side * size % self.size for shape in self.shapes for side in shape):
            raise UserError(
                f"buckets of {self.size} px are no whole pixels at {size} px: set buckets' size to "
                "the smallest of the pictures"
            )
        return [(h * size // self.size, w * size // self.size) for h, w in self.shapes]

    def place(self, spare: int, rng: np.random.Generator) -> int:
        """How many of the spare pixels of a resized picture are cut off before its part."""
        return int(rng.integers(spare + 1)) if self.crop == "random" else spare // 2

    def nearest(
        self, heights: Sequence[int] | np.ndarray, widths: Sequence[int] | np.ndarray
    ) -> Int64[np.ndarray, " n"]:
        """The number of the bucket whose aspect ratio is nearest, in logarithms.

        Of two that are as near it is the wider. Sides of 0 are unknown and go to the square.
        """
        own = np.log(np.array([w / h for h, w in self.shapes]))
        known = np.minimum(heights, widths) > 0
        ratios = np.where(known, widths, 1) / np.where(known, heights, 1)
        return np.abs(np.log(ratios)[:, None] - own).argmin(1)

    def merged(self, counts: Sequence[int]) -> Int64[np.ndarray, " k"]:
        """The bucket that the pictures of each bucket are trained in, by their numbers.

        A bucket with less than a batch would repeat its pictures within one. From the smallest on,
        such buckets are closed, and their pictures go to the nearest one that is open.
        """
        own = [math.log(w / h) for h, w in self.shapes]
        goes, held = np.arange(len(own)), np.array(counts, np.int64)
        opened = set(goes.tolist())
        while len(opened) > 1:
            least = min(opened, key=lambda b: (held[b], b))
            if held[least] >= self.batch:
                break
            opened.remove(least)
            nearest = min(opened, key=lambda b: (abs(own[b] - own[least]), b))
            goes[goes == least] = nearest
            held[nearest] += held[least]
        return goes
