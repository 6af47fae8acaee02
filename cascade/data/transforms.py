"""Decodes files to pictures in [-1, 1]: the centred square, resized by anti-aliased bicubic.

The same filter everywhere: a file is decoded once to the largest size needed, and smaller sizes are
shrunk from that, so that training and evaluation make low-resolution inputs in the same way.
Pictures are never flipped, because captions say "left" and "right".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cascade.batch import image_key
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


@dataclass(frozen=True)
class Pictures:
    """Makes a sample's picture at every size that a stage reads or writes.

    Args:
        sizes: in pixels; all divide the largest. If empty, the files are not even read.
        crop: side of a random crop, in pixels of the largest size. Smaller pictures get the same
            crop of the whole shrunk picture, so that their borders look as they do in sampling.
        degrade: makes the picture at a quarter of the largest size from the (cropped) largest. It
            has its own random stream, so that crops are the same with and without it.

    Raises:
        UserError: sizes that do not divide the largest, a crop that does not align with whole
            pixels at every size, or no size a quarter of the largest for `degrade`.
    """

    sizes: Sequence[int]
    crop: int | None = None
    degrade: BSR | None = None

    def __post_init__(self):
        if any(self.largest % size for size in self.sizes):
            raise UserError(f"sizes={list(self.sizes)}: choose sizes that divide {self.largest}")
        if self.crop and (self.crop > self.largest or self.crop % self._ratio):
            raise UserError(
                f"crop={self.crop}: choose a multiple of {self._ratio} up to {self.largest}"
            )
        if self.degrade and self.largest not in [FACTOR * size for size in self.sizes]:
            raise UserError(
                f"sizes={list(self.sizes)}: degrade makes pictures {FACTOR} times smaller than the "
                "largest; choose such a size, or omit degrade"
            )

    @property
    def largest(self) -> int:
        """The size to decode to; 0 if there are no sizes."""
        return max(self.sizes, default=0)

    @property
    def _ratio(self) -> int:  # crops start at multiples of it: on whole pixels at every size
        return self.largest // math.gcd(*self.sizes) if self.sizes else 1

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Float[Tensor, "3 h w"]]:
        """Decode to `image_{size}` in [-1, 1] for each size. Raises BadSample as `decode` does."""
        return self.views(decode(data, self.largest), rng) if self.sizes else {}

    def views(
        self, picture: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator
    ) -> dict[str, Float[Tensor, "3 h w"]]:
        """Make `image_{size}` of each size from a picture decoded at the largest size."""
        whole = np.empty((3, *picture.shape[:2]), np.float32)
        np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=whole, dtype=np.float32)
        whole = torch.from_numpy(np.subtract(whole, 1, out=whole))
        degraded = self.largest // FACTOR if self.degrade else None
        undegraded = [n for n in self.sizes if n != degraded]
        views = {n: whole if n == self.largest else shrink(whole, n) for n in undegraded}
        if self.crop:
            steps = (self.largest - self.crop) // self._ratio
            top, left = (self._ratio * rng.integers(steps + 1, size=2)).tolist()
            for n, x in views.items():
                t, l, side = (v * n // self.largest for v in (top, left, self.crop))
                views[n] = x[:, t : t + side, l : l + side].clone()
        if self.degrade:
            views[degraded] = self.degrade(views[self.largest], rng.spawn(1)[0])
        return {image_key(n): x for n, x in views.items()}
