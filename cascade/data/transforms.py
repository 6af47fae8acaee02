"""Decodes files to pictures in [-1, 1]: the centred square, resized by anti-aliased bicubic.

The same filter everywhere: a file is decoded once to the largest size needed, and smaller sizes are
shrunk from that, so that training and evaluation make low-resolution inputs in the same way.
Pictures are never flipped, because captions say "left" and "right".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cascade.batch import hint_key, image_key
from cascade.data.bsr import BSR, FACTOR
from cascade.errors import UserError
from cascade.formats.rgb import BadSample, opened, orientation, reasons, rgb, upright

# JPEG's scaled decoding stops at this multiple of the target size, and the anti-aliased filter does
# the rest. With 1 the mean PSNR against full decoding falls below 40 dB; 3 is slower.
_MARGIN = 2


def decode(
    data: bytes, size: int, scaled: bool = True, stated: int | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """Decode the centred square of a JPEG, PNG or WebP file at `size` (see `rgb`).

    Args:
        scaled: use JPEG's scaled decoding. False, the reference, is slower.
        stated: EXIF orientation number to use if the file itself has none.

    Raises:
        BadSample: not a picture, a broken one, one that `rgb.opened` refuses before decoding, or
            one whose short side is less than a quarter of `size`.
    """
    image = opened(data)
    with reasons():
        w, h = image.size
        if 4 * min(w, h) < size:
            raise BadSample("picture too small")
        turn = orientation(image, stated)
        drafted = image.draft(None, (_MARGIN * size, _MARGIN * size)) if scaled else None
        # In pixels of the scaled decode a side need not be an integer: 500 px at 1/8 are 62.5.
        scale = drafted[1][2] / w if drafted else 1.0
        box = tuple(scale * edge for edge in _centre(w, h, turn))
        return upright(_resized(rgb(image), size, box), turn)


def _centre(w: int, h: int, turn: int) -> tuple[int, int, int, int]:
    """Return the edges of the square that is centred once the picture is rotated upright."""
    side = min(w, h)
    # An odd remainder puts the square half a pixel nearer to the upright picture's top or left.
    left = w - side - (w - side) // 2 if turn in (2, 3, 7, 8) else (w - side) // 2
    top = h - side - (h - side) // 2 if turn in (3, 4, 6, 7) else (h - side) // 2
    return left, top, left + side, top + side


def _resized(image: Image.Image, size: int, box: tuple[float, ...]) -> UInt8[np.ndarray, "s s 3"]:
    """Resize a part of a picture. torch's filter is Pillow's to one level, and much faster."""
    if any(edge % 1 for edge in box):
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    part = torch.from_numpy(np.array(image)[top:bottom, left:right]).permute(2, 0, 1)[None]
    square = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return square[0].permute(1, 2, 0).numpy()


def shrink(x: Float[Tensor, "*b 3 h w"], size: int) -> Float[Tensor, "*b 3 {size} {size}"]:
    """Shrink square pictures in [-1, 1] by anti-aliased bicubic, clamped to [-1, 1]."""
    small = F.interpolate(
        x.reshape(-1, *x.shape[-3:]), (size, size), mode="bicubic", antialias=True
    )
    return small.clamp(-1, 1).reshape(*x.shape[:-2], size, size)


@runtime_checkable
class Condition(Protocol):
    """A sample's picture of a condition, such as its edges (`cascade.data.conditions`).

    Attributes:
        size: its side, in pixels.
        seen: side of the sample's own picture that it is computed from; 0: from none.
    """

    @property
    def size(self) -> int: ...

    @property
    def seen(self) -> int: ...

    def __call__(
        self, picture: UInt8[np.ndarray, "s s 3"] | None, sample: Any
    ) -> UInt8[np.ndarray, "n n 3"]:
        """The condition of an `items.Sample`.

        Args:
            picture: its own, of side `seen`.

        Raises:
            BadSample: the sample lacks what it is computed from.
        """


@dataclass(frozen=True)
class Pictures:
    """Makes a sample's picture at every size that a stage reads or writes.

    Args:
        sizes: in pixels; all divide the largest. If empty, the files are not even read.
        crop: side of a random crop, in pixels of the largest size. Smaller pictures get the same
            crop of the whole shrunk picture, so that their borders look as they do in sampling.
        degrade: makes the picture at a quarter of the largest size from the (cropped) largest. It
            has its own random stream, so that crops are the same with and without it.
        conditions: pictures of conditions that ControlNets read, by name. They are cropped alike.

    Raises:
        UserError: sizes that do not divide the largest, a crop that does not align with whole
            pixels at every size, or no size a quarter of the largest for `degrade`.
    """

    sizes: Sequence[int]
    crop: int | None = None
    degrade: BSR | None = None
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    def __post_init__(self):
        sides = [*self.sizes, *(one.size for one in self.conditions.values())]
        if any(max(sides) % size for size in sides):
            raise UserError(f"sizes={sides}: choose sizes that divide {max(sides)}")
        if self.crop and (self.crop > self._side or self.crop % self._ratio):
            raise UserError(
                f"crop={self.crop}: choose a multiple of {self._ratio} up to {self._side}"
            )
        if self.degrade and self._side not in [FACTOR * size for size in self.sizes]:
            raise UserError(
                f"sizes={list(self.sizes)}: degrade makes pictures {FACTOR} times smaller than the "
                "largest; choose such a size, or omit degrade"
            )

    @property
    def largest(self) -> int:
        """The size to decode to; 0 if there are no sizes."""
        return max([self._side, *(one.seen for one in self.conditions.values())])

    @property
    def _side(self) -> int:
        return max(self.sizes, default=0)

    @property
    def _ratio(self) -> int:  # crops start at multiples of it: on whole pixels at every size
        sides = [*self.sizes, *(one.size for one in self.conditions.values())]
        return self._side // math.gcd(*sides) if self.sizes else 1

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Float[Tensor, "3 h w"]]:
        """Decode to `image_{size}` in [-1, 1] for each size. Raises BadSample as `decode` does."""
        return self.views(decode(data, self.largest), rng) if self.sizes else {}

    def views(
        self,
        picture: UInt8[np.ndarray, "s s 3"],
        rng: np.random.Generator,
        sample: Any = None,
    ) -> dict[str, Float[Tensor, "3 h w"]]:
        """Make `image_{size}` of each size from a picture decoded at the largest size.

        Args:
            sample: what `items.Sample` describes, for conditions; None: they are black.

        Raises:
            BadSample: the sample lacks what a condition is computed from.
        """
        whole = scaled(picture)
        degraded = self._side // FACTOR if self.degrade else None
        undegraded = [n for n in self.sizes if n != degraded]
        views = {image_key(n): whole if n == self.largest else shrink(whole, n) for n in undegraded}
        for name, one in self.conditions.items():
            own = picture if one.seen == self.largest else None
            if own is None and one.seen:
                own = _bytes(shrink(whole, one.seen))
            black = np.zeros((one.size, one.size, 3), np.uint8)
            views[hint_key(name, one.size)] = scaled(black if sample is None else one(own, sample))
        if self.crop:
            steps = (self._side - self.crop) // self._ratio
            top, left = (self._ratio * rng.integers(steps + 1, size=2)).tolist()
            for key, x in views.items():
                t, l, side = (v * x.shape[-1] // self._side for v in (top, left, self.crop))
                views[key] = x[:, t : t + side, l : l + side].clone()
        if self.degrade:
            largest = views[image_key(self._side)]
            views[image_key(degraded)] = self.degrade(largest, rng.spawn(1)[0])
        return views


def scaled(picture: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """The pixels in [-1, 1]."""
    whole = np.empty((3, *picture.shape[:2]), np.float32)
    np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=whole, dtype=np.float32)
    return torch.from_numpy(np.subtract(whole, 1, out=whole))


def _bytes(x: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
