"""Between a user's picture and the pictures that stages see.

A `Canvas` is an upright picture of any size, and what of it to paint. A `Frame` is the part of its
plane that the cascade shows. What lies in the frame but outside of the canvas is painted too, and
discarded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from torch import Tensor

from cascade.batch import Batch, image_key
from cascade.edit.operations import KNOWN, UNKNOWN
from cascade.grids import to_uint8

Places = tuple[np.ndarray, ...]  # an index of rows and columns


class Frame(NamedTuple):
    """A rectangle in pixels of a canvas, beyond which it may reach."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Canvas:
    """A picture, and which of its pixels to paint."""

    picture: UInt8[np.ndarray, "h w 3"]
    unknown: Bool[np.ndarray, "h w"]

    @classmethod
    def known(cls, picture: UInt8[np.ndarray, "h w 3"]) -> "Canvas":
        """A picture of which nothing is to be painted."""
        return cls(picture, np.zeros(picture.shape[:2], dtype=bool))

    def enlarged(self, left: int, right: int, top: int, bottom: int) -> "Canvas":
        """With further pixels on each side, to be painted."""
        around = (top, bottom), (left, right)
        return Canvas(
            np.pad(self.picture, (*around, (0, 0)), mode="edge"),
            np.pad(self.unknown, around, constant_values=True),
        )

    def square(self, pad: bool = False) -> Frame:
        """The centred square: as wide as the short side, or with `pad` as the long one."""
        height, width = self.unknown.shape
        side = max(height, width) if pad else min(height, width)
        return Frame((width - side) // 2, (height - side) // 2, side, side)

    def whole(self, size: int, multiple: int) -> tuple[Frame, tuple[int, int]]:
        """A frame of the whole canvas, and the sides (height, width) of its smallest picture.

        Args:
            size: the side of that picture that shows the canvas's short side.
            multiple: what the other side is a multiple of; the frame is extended for it.
        """
        height, width = self.unknown.shape
        short, long = sorted((height, width))
        side = math.ceil(long * size / short / multiple - 1e-9) * multiple
        length = max(long, round(side * short / size))
        before = (length - long) // 2
        if height > width:
            return Frame(0, -before, width, length), (side, size)
        return Frame(-before, 0, length, height), (size, side)

    def views(self, frame: Frame, sides: Mapping[int, tuple[int, int]]) -> Batch:
        """What stages see of it: `known/image_{size}` [1, 3, h, w], `unknown/...` [1, 1, h, w].

        A stage's pixel is unknown if all that it covers is, so that no stage paints an object
        across the mask's border, which a later stage would cut. Unknown pixels take the colour of
        the nearest known one before the picture is resized, so that nothing of what they showed
        enters their neighbours.

        Args:
            sides: height and width by the stage's size.
        """
        here, there = self._overlap(frame)
        unknown = np.ones((frame.height, frame.width), dtype=bool)
        picture = np.zeros((*unknown.shape, 3), dtype=np.uint8)
        unknown[there], picture[there] = self.unknown[here], self.picture[here]
        if unknown.any():
            nearest = ndimage.distance_transform_edt(
                unknown, return_distances=False, return_indices=True
            )
            picture = picture[tuple(nearest)]
        whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        covered = torch.from_numpy(unknown)[None, None].float()
        out, largest = {}, max(sides)
        for size in sorted(sides, reverse=True):  # smaller ones from the largest, as in training
            source = whole if size == largest else out[KNOWN + image_key(largest)]
            out[KNOWN + image_key(size)] = _resized(source, sides[size])
            share = F.adaptive_avg_pool2d(covered, sides[size])
            out[UNKNOWN + image_key(size)] = share > 1 - 1e-6
        return out

    def pasted(self, painted: Float[Tensor, "3 y x"], frame: Frame) -> UInt8[np.ndarray, "h w 3"]:
        """The canvas with its unknown pixels as `painted` shows them, and all others untouched."""
        resized = to_uint8(_resized(painted[None], (frame.height, frame.width)))[0]
        here, there = self._overlap(frame)
        new = self.picture.copy()
        new[here] = resized[there]
        return np.where(self.unknown[..., None], new, self.picture)

    def within(self, frame: Frame) -> bool:
        """Whether all that is to be painted lies in the frame."""
        here, _ = self._overlap(frame)
        return bool(self.unknown[here].sum() == self.unknown.sum())

    def _overlap(self, frame: Frame) -> tuple[Places, Places]:
        """The places that canvas and frame share: in the canvas, and in the frame."""
        height, width = self.unknown.shape
        y, x = frame.top + np.arange(frame.height), frame.left + np.arange(frame.width)
        inside = (y >= 0) & (y < height), (x >= 0) & (x < width)
        return np.ix_(y[inside[0]], x[inside[1]]), np.ix_(*inside)


def _resized(x: Float[Tensor, "b 3 h w"], sides: tuple[int, int]) -> Float[Tensor, "b 3 H W"]:
    """Resized by anti-aliased bicubic, as pictures for training are, and clamped to [-1, 1]."""
    if tuple(x.shape[2:]) == sides:
        return x
    return F.interpolate(x, sides, mode="bicubic", antialias=True).clamp(-1, 1)
