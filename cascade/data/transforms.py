"""From the bytes of a file to pictures in [-1, 1]: a centred square, anti-aliased bicubic.

One filter everywhere: a file is decoded once to the largest size asked for, and the smaller sizes
are shrunk from that, so that a low-resolution input is made the same way in training and in
evaluation. There is no mirroring: captions say "left" and "right".
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

from cascade.data.bsr import BSR, FACTOR
from cascade.data.rgb import BadSample, opened, orientation, reasons, rgb, upright
from cascade.errors import UserError

# JPEG's scaled decoding stops at this many times the target, and the anti-aliased filter does the
# rest: with 1 the mean PSNR against the full decode falls below 40 dB, with 3 it is slower.
_MARGIN = 2


def decode(
    data: bytes, size: int, scaled: bool = True, stated: int | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """The centred square of a JPEG, PNG or WebP file, resized to `size`: see `rgb`.

    Args:
        scaled: False decodes a JPEG in full first, which is slower and the reference.
        stated: EXIF's number of how it has to be turned, where the file itself does not say.

    Raises:
        BadSample: no picture, a broken one, one that `rgb.opened` refuses before anything is
            decoded, or one whose short side is under a quarter of `size`.
    """
    image = opened(data)
    with reasons():
        w, h = image.size
        if 4 * min(w, h) < size:
            raise BadSample("picture too small")
        turn = orientation(image, stated)
        drafted = image.draft(None, (_MARGIN * size, _MARGIN * size)) if scaled else None
        # In pixels of the scaled decode a side need not be whole: 500 px at 1/8 are 62.5.
        scale = drafted[1][2] / w if drafted else 1.0
        box = tuple(scale * edge for edge in _centre(w, h, turn))
        return upright(_resized(rgb(image), size, box), turn)


def _centre(w: int, h: int, turn: int) -> tuple[int, int, int, int]:
    """Edges of the square that is in the centre once the picture is turned."""
    side = min(w, h)
    # Where it cannot be in the middle it is nearer to the left and to the top of what is upright.
    left = w - side - (w - side) // 2 if turn in (2, 3, 7, 8) else (w - side) // 2
    top = h - side - (h - side) // 2 if turn in (3, 4, 6, 7) else (h - side) // 2
    return left, top, left + side, top + side


def _resized(image: Image.Image, size: int, box: tuple[float, ...]) -> UInt8[np.ndarray, "s s 3"]:
    """A part of a picture, at `size`: torch's filter is Pillow's to one level, and much faster."""
    if any(edge % 1 for edge in box):
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    part = torch.from_numpy(np.array(image)[top:bottom, left:right]).permute(2, 0, 1)[None]
    square = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return square[0].permute(1, 2, 0).numpy()


def shrink(x: Float[Tensor, "*b 3 h w"], size: int) -> Float[Tensor, "*b 3 {size} {size}"]:
    """A square picture in [-1, 1] at a smaller size: anti-aliased bicubic, clamped to [-1, 1]."""
    small = F.interpolate(
        x.reshape(-1, *x.shape[-3:]), (size, size), mode="bicubic", antialias=True
    )
    return small.clamp(-1, 1).reshape(*x.shape[:-2], size, size)


@dataclass(frozen=True)
class Pictures:
    """The picture of a sample at every size that a stage reads or writes.

    Args:
        sizes: in pixels; all divide the largest. None at all: the files are not even read.
        crop: side of a random crop, in pixels of the largest size; the smaller pictures get the
            corresponding crop of the whole shrunk picture, so that its borders look as they do
            in sampling.
        degrade: makes the picture at a quarter of the largest size, of the (cropped) largest; by
            a stream of its own, so that the crops are the same with and without it.

    Raises:
        UserError: sizes that do not divide the largest, a crop that does not line up, or none of
            the sizes a quarter of the largest for `degrade`.
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
                "largest; choose such a size, or leave it out"
            )

    @property
    def largest(self) -> int:
        """The size that is decoded; 0 if there is none."""
        return max(self.sizes, default=0)

    @property
    def _degraded(self) -> int | None:
        return self.largest // FACTOR if self.degrade else None

    @property
    def _ratio(self) -> int:  # crops start at multiples of it, so that they start on whole pixels
        return self.largest // math.gcd(*self.sizes) if self.sizes else 1

    def __call__(self, data: bytes, rng: np.random.Generator) -> dict[str, Float[Tensor, "3 h w"]]:
        """`image_{size}` in [-1, 1] for each size. Raises BadSample as `decode` does."""
        return self.views(decode(data, self.largest), rng) if self.sizes else {}

    def views(
        self, picture: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator
    ) -> dict[str, Float[Tensor, "3 h w"]]:
        """The same from a picture decoded at the largest size."""
        whole = np.empty((3, *picture.shape[:2]), np.float32)
        np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=whole, dtype=np.float32)
        whole = torch.from_numpy(np.subtract(whole, 1, out=whole))
        undegraded = [n for n in self.sizes if n != self._degraded]
        views = {n: whole if n == self.largest else shrink(whole, n) for n in undegraded}
        if self.crop:
            steps = (self.largest - self.crop) // self._ratio
            top, left = (self._ratio * rng.integers(steps + 1, size=2)).tolist()
            for n, x in views.items():
                t, l, side = (v * n // self.largest for v in (top, left, self.crop))
                views[n] = x[:, t : t + side, l : l + side].clone()
        if self.degrade:
            views[self._degraded] = self.degrade(views[self.largest], rng.spawn(1)[0])
        return {f"image_{n}": x for n, x in views.items()}
