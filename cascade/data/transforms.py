"""Decodes files to pictures in [-1, 1]: the centred square, resized by anti-aliased bicubic.

Or, in aspect-ratio buckets (`cascade.buckets`), a part of the bucket's shape, as large as it fits.

The same filter everywhere: a file is decoded once to the largest size needed, and smaller sizes are
shrunk from that, so that training and evaluation make low-resolution inputs in the same way.
Pictures are never flipped, because captions say "left" and "right".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cascade.batch import FRAMING, hint_key, image_key
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
        turn = orientation(image, stated)
        h, w = _sides(image, turn)
        if 4 * min(w, h) < size:
            raise BadSample("picture too small")
        # An odd remainder puts the square half a pixel nearer to the top or left.
        side, top, left = min(w, h), max(0, h - w) // 2, max(0, w - h) // 2
        return _part(image, turn, (top, left, top + side, left + side), (size, size), scaled)


def framed(
    data: bytes,
    stated: int | None,
    shape: tuple[int, int],
    place: Callable[[int], int],
) -> tuple[UInt8[np.ndarray, "h w 3"], dict[str, tuple[int, int]]]:
    """Decode the part of a file that fills a shape, once the file is resized to just cover it.

    Args:
        stated: as of `decode`.
        shape: height and width.
        place: how many of a number of spare pixels to cut off before the part.

    Returns:
        The part, and height and width, or top and left, of `FRAMING`: the file's, those of the part
        in the resized picture, and the part's own.

    Raises:
        BadSample: as `decode` does; too small if it had to be enlarged to more than four times.
    """
    image = opened(data)
    with reasons():
        turn = orientation(image, stated)
        sides = _sides(image, turn)
        scale = max(new / old for new, old in zip(shape, sides))
        if scale > 4:
            raise BadSample("picture too small")
        # A whole picture that is resized may end within a pixel. The 1e-6 keeps those that do not.
        spare = [int(scale * n + 1e-6) - m for n, m in zip(sides, shape)]
        corner = (place(spare[0]), place(spare[1]))
        near = [at / scale for at in corner]
        far = [
            min(n, start + m / scale) if more else n
            for n, start, m, more in zip(sides, near, shape, spare)
        ]
        part = _part(image, turn, (*near, *far), shape, scaled=True)
        return part, dict(zip(FRAMING, (sides, corner, shape)))


def _sides(image: Image.Image, turn: int) -> tuple[int, int]:
    """Height and width of a picture once it is upright."""
    return image.size if turn > 4 else image.size[::-1]


def _part(
    image: Image.Image,
    turn: int,
    box: tuple[float | int, ...],
    shape: tuple[int, int],
    scaled: bool,
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a part of a picture: top, left, bottom and right of the upright one, to a shape."""
    top, left, bottom, right = box
    w, h = image.size
    if turn > 4:
        top, left, bottom, right, shape = left, top, right, bottom, shape[::-1]
    if turn in (2, 3, 7, 8):
        left, right = w - right, w - left
    if turn in (3, 4, 6, 7):
        top, bottom = h - bottom, h - top
    most = min((bottom - top) // (_MARGIN * shape[0]), (right - left) // (_MARGIN * shape[1]))
    factor = next(n for n in (8, 4, 2, 1) if n <= max(1, most))  # those that a decoder knows
    drafted = image.draft(None, (w // factor, h // factor)) if scaled else None
    # In pixels of the scaled decode a side need not be an integer: 500 px at 1/8 are 62.5.
    scale = drafted[1][2] / w if drafted else 1.0
    edges = tuple(scale * edge for edge in (left, top, right, bottom))
    return upright(_resized(rgb(image), shape, edges), turn)


def _resized(
    image: Image.Image, shape: tuple[int, int], box: tuple[float | int, ...]
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize a part of a picture. torch's filter is Pillow's to one level, and much faster."""
    if any(edge % 1 for edge in box):
        return np.array(image.resize(shape[::-1], Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    pixels = np.array(image)[top:bottom, left:right]
    if pixels.shape[:2] == shape:
        return pixels  # the filter would change nothing, and takes longer than decoding
    part = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(part, shape, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def shrink(x: Float[Tensor, "*b 3 h w"], size: int) -> Float[Tensor, "*b 3 {size} {size}"]:
    """Shrink square pictures in [-1, 1] by anti-aliased bicubic, clamped to [-1, 1]."""
    return _shrunk(x, (size, size))


def _shrunk(x: Float[Tensor, "*b 3 h w"], shape: tuple[int, int]) -> Float[Tensor, "*b 3 H W"]:
    small = F.interpolate(x.reshape(-1, *x.shape[-3:]), shape, mode="bicubic", antialias=True)
    return small.clamp(-1, 1).reshape(*x.shape[:-2], *shape)


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
        picture: UInt8[np.ndarray, "h w 3"],
        rng: np.random.Generator,
        sample: Any = None,
    ) -> dict[str, Float[Tensor, "3 _ _"]]:
        """Make `image_{size}` of each size from a picture decoded at the largest size.

        A picture in a bucket keeps its shape at each size.

        Args:
            sample: what `items.Sample` describes, for conditions; None: they are black.

        Raises:
            BadSample: the sample lacks what a condition is computed from.
        """
        whole = scaled(picture)
        degraded = self._side // FACTOR if self.degrade else None
        undegraded = [n for n in self.sizes if n != degraded]
        views = {image_key(n): self._at(whole, n) for n in undegraded}
        for name, one in self.conditions.items():
            own = picture if one.seen == self.largest else None
            if own is None and one.seen:
                own = _bytes(self._at(whole, one.seen))
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

    def _at(self, whole: Float[Tensor, "3 h w"], size: int) -> Float[Tensor, "3 H W"]:
        """Shrink a picture of the largest size to another."""
        if size == self.largest:
            return whole
        height, width = (side * size // self.largest for side in whole.shape[1:])
        return _shrunk(whole, (height, width))


def scaled(picture: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """The pixels in [-1, 1]."""
    whole = np.empty((3, *picture.shape[:2]), np.float32)
    np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=whole, dtype=np.float32)
    return torch.from_numpy(np.subtract(whole, 1, out=whole))


def _bytes(x: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return ((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
