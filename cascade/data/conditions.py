"""Pictures of conditions, which ControlNets read: edges, segmentation, depth...

`edges`, `lines` and `scribble` are computed from a picture; `segmentation` and `depth` are those of
a scene, as its renderer knows them. Pictures that the shards hold are read as they are (`Column`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from scipy import ndimage

from cascade.data.items import Sample, fields_of
from cascade.data.scenes.captions import Object, Scene
from cascade.data.scenes.drawing import SHAPES
from cascade.data.transforms import BadSample, decode

STEEP, FLAT = 16.0, 8.0  # gradients of strong and weak edges, in grey levels per pixel
WINDOW = 6.0  # standard deviation of the neighbourhood in which lines are straight, in pixels
STRAIGHT = 0.55  # greatest deviation of a straight line there, in pixels
# Colours of the shapes in a segmentation, by their order; the background is black.
PALETTE = np.array(
    [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)],
    dtype=np.uint8,
)

Picture = UInt8[np.ndarray, "s s 3"]


@dataclass(frozen=True)
class OfPicture:
    """A condition that a function computes from a picture.

    Args:
        by: the function.
        size: side in pixels.
    """

    by: Callable[[Picture], Picture]
    size: int

    @property
    def seen(self) -> int:
        return self.size

    def __call__(self, picture: Picture, sample: Any = None) -> Picture:
        return self.by(picture)


@dataclass(frozen=True)
class OfScene:
    """A condition that a function computes from a scene, as its renderer knows it.

    Args:
        by: the function.
        size: side in pixels.
    """

    by: Callable[[Scene, int], Picture]
    size: int
    seen: ClassVar[int] = 0

    def __call__(self, picture: None, sample: Sample) -> Picture:
        try:
            scene = Scene.from_json(fields_of(sample)["scene"])
        except (KeyError, TypeError) as error:
            raise BadSample("no scene in its JSON") from error
        return self.by(scene, self.size)


@dataclass(frozen=True)
class Column:
    """A condition that each sample holds as a further file beside its picture.

    Args:
        extension: of the file, as "depth.png" of 000000001.depth.png.
        size: side in pixels, to which its centred square is resized.
    """

    extension: str
    size: int
    seen: ClassVar[int] = 0

    def __call__(self, picture: None, sample: Sample) -> Picture:
        if not (data := sample.read(self.extension)):
            raise BadSample(f"no {self.extension}")
        return decode(data, self.size)


def edges(picture: Picture) -> Picture:
    """Edges, white on black, one pixel wide (Canny 1986).

    Gradients are those of the channel that changes most, after a Gaussian blur of 1 px. An edge is
    a maximum across the edge's direction that is steeper than `STEEP`, or than `FLAT` and connected
    to such a one.
    """
    return _drawn(_edges(picture))


def lines(picture: Picture) -> Picture:
    """The straight edges: those that deviate little from a line within some pixels around.

    The deviation is the smaller principal axis of the edge's pixels under a Gaussian window.
    """
    found = _edges(picture)
    weight = found.astype(np.float32)
    y, x = np.mgrid[: len(found), : len(found)].astype(np.float32)

    def mean(values: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "s s"]:
        return ndimage.gaussian_filter(weight * values, WINDOW) / total

    total = np.maximum(ndimage.gaussian_filter(weight, WINDOW), 1e-6)
    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    smaller = (xx + yy) / 2 - np.sqrt(np.maximum(0, ((xx - yy) / 2) ** 2 + xy**2))
    return _drawn(found & (smaller < STRAIGHT**2))


def scribble(picture: Picture) -> Picture:
    """Edges as of a coarse brush: on a grid of 1/64 of the side, three cells wide."""
    found = _edges(picture)
    cell = max(1, len(found) // 64)
    cells = found.reshape(len(found) // cell, cell, -1, cell).any((1, 3))
    wide = ndimage.binary_dilation(cells)
    return _drawn(wide.repeat(cell, 0).repeat(cell, 1))


def segmentation(scene: Scene, size: int) -> Picture:
    """Each pixel in the colour of the shape that it belongs to (`PALETTE`); the ground is black."""
    return PALETTE[labels(scene.objects if scene.shown else (), size)]


def depth(scene: Scene, size: int) -> Picture:
    """Nearness in grey: the background is black, and what is painted later is nearer.

    The nearest object is white.
    """
    out = np.zeros((size, size), np.uint8)
    objects = scene.objects if scene.shown else ()
    for i, o in enumerate(objects, 1):
        out[_inside(o, size)] = 255 * i // len(objects)
    return np.repeat(out[..., None], 3, 2)


def labels(objects: tuple[Object, ...], size: int) -> Int64[np.ndarray, "{size} {size}"]:
    """The class of each pixel: 0 the ground, then the shapes in their order."""
    names = list(SHAPES)
    out = np.zeros((size, size), np.int64)
    for o in objects:
        out[_inside(o, size)] = 1 + names.index(o.shape)
    return out


def _inside(o: Object, size: int) -> Bool[np.ndarray, "{size} {size}"]:
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    return SHAPES[o.shape](((at - o.x) / o.diameter)[None], ((at - o.y) / o.diameter)[:, None]) < 0


def _drawn(mask: Bool[np.ndarray, "h w"]) -> Picture:
    return np.repeat((255 * mask.astype(np.uint8))[..., None], 3, 2)


def _edges(picture: Picture) -> Bool[np.ndarray, "s s"]:
    x = picture.transpose(2, 0, 1).astype(np.float32)
    x = ndimage.gaussian_filter(x, (0, 1, 1), truncate=3)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge")
    dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    steepness = dx * dx + dy * dy
    channel = steepness.argmax(0)[None]
    dx, dy, steepness = (np.take_along_axis(v, channel, 0)[0] for v in (dx, dy, steepness))
    # The two neighbours across the edge, by the octant of the gradient's direction.
    octant = np.rint(np.arctan2(dy, dx) * (4 / np.pi)).astype(int) % 4
    padded = np.pad(steepness, 1)
    peak = np.zeros(steepness.shape, bool)
    h, w = steepness.shape
    for k, (j, i) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + j : 1 + j + h, 1 + i : 1 + i + w]
        behind = padded[1 - j : 1 - j + h, 1 - i : 1 - i + w]
        peak |= (octant == k) & (steepness >= ahead) & (steepness > behind)
    weak = peak & (steepness > FLAT**2)
    groups, _ = ndimage.label(weak, np.ones((3, 3)))
    strong = np.unique(groups[weak & (steepness > STEEP**2)])
    return np.isin(groups, strong[strong > 0])
