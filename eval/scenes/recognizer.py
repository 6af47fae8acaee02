"""Recognizes the objects in a picture of a scene by analysis by synthesis, without a network.

Each region that stands out from the background is matched against every shape and against the mean
of every two shapes. The recognized objects are then rendered, and a picture that differs from the
rendering is rejected. Larger pictures are averaged down to 64 px first: all lengths are in these
pixels, and finer detail is not seen.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage

from cascade.data.scenes.captions import RELATIONS, Object, Scene
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS, NOVEL, SHAPES, WRITTEN, Shape
from cascade.data.scenes.generate import SIZES

SIDE = 64
AREA = 12  # pixels of the smallest region that may be an object
COLOR_RADIUS = 38.0  # RGB distance; colours are 116 apart, and 58 from any mixture of two
GROUND_RADIUS = 35.0  # captions do not name the background, so this need not separate mixtures
SIZE_MARGIN = 0.012  # tolerance around the range of a size, as a fraction of the side
DIAMETERS = (0.19, 0.42)  # range of an object's diameter, as a fraction of the side
MISFIT = 0.025  # largest squared error of a shape's coverage, divided by its area
EDGE = 2.0  # pixels around an outline that the residual ignores: the misfit covers them
RESIDUAL = 6.5  # largest unexplained difference in grey levels, averaged over about 7 px
# Standard deviations in pixels. The picture's coverage is blurred by the first, so that single
# pixels count less; a template is tried with each, since the picture itself may be soft.
BLURS = (0.6, 0.75, 0.92, 1.08, 1.3)

# From RGB to luminance and chrominance. Chrominance has a lower weight, since JPEG stores it at
# half the resolution.
LUMA_CHROMA = np.array(
    [[0.299, 0.587, 0.114], [-0.076, -0.148, 0.224], [0.224, -0.187, -0.036]], dtype=np.float32
)

Window = tuple[slice, slice]
Pixels = Float[np.ndarray, "64 64 3"]
Color = Float[np.ndarray, "3"]
Part = Float[np.ndarray, "h w"]


@dataclass(frozen=True)
class Recognition:
    """The recognized background and objects.

    `residual` is the largest difference between their rendering and the picture, in grey levels.
    """

    background: str | None
    objects: tuple[Object, ...]
    residual: float

    @property
    def clean(self) -> bool:
        """Whether background and objects explain the whole picture."""
        return self.residual <= RESIDUAL


class Template(NamedTuple):
    """A shape, with its area and centroid in the unit box.

    A template without a name is the mean of two shapes: a region that matches one is rejected.
    """

    name: str | None
    shape: Shape
    area: float
    x: float
    y: float


class Match(NamedTuple):
    """A template placed on a region, and its misfit."""

    misfit: float
    blur: float
    template: Template
    x: float
    y: float
    diameter: float


def _template(name: str | None, shape: Shape) -> Template:
    grid = (np.arange(240, dtype=np.float32) + 0.5) / 200 - 0.6
    y, x = np.nonzero(shape(grid[None], grid[:, None]) < 0)
    return Template(name, shape, len(x) / 200**2, float(grid[x].mean()), float(grid[y].mean()))


def _mean(one: Shape, other: Shape) -> Shape:
    return lambda x, y: (one(x, y) + other(x, y)) / 2


def _gaussian(sigma: float) -> Float[np.ndarray, "64 64"]:
    offsets = np.subtract.outer(np.arange(SIDE), np.arange(SIDE), dtype=np.float32)
    return np.exp(-np.square(offsets / sigma) / 2) / (sigma * (2 * np.pi) ** 0.5)


GAUSSIAN = {sigma: _gaussian(sigma) for sigma in BLURS}


@cache
def _templates(novel: frozenset[str]) -> tuple[list[Template], list[Template]]:
    """Those of the shapes of all levels and of some novel ones, and the means of each two."""
    shapes = SHAPES | {name: NOVEL[name] for name in sorted(novel)}
    known = [_template(name, shape) for name, shape in shapes.items()]
    return known, [_template(None, _mean(*pair)) for pair in combinations(shapes.values(), 2)]


def recognize(
    picture: UInt8[np.ndarray, "h w 3"],
    written: bool = False,
    novel: frozenset[str] = frozenset(),
) -> Recognition:
    """Finds the background and the objects of a picture, and the residual they leave.

    A region that is not clearly a known shape in a known colour is no object and adds to the
    residual. An object between small and large has the size "medium".

    Args:
        written: a word may be written in the picture, and is not looked at.
        novel: names of novel shapes that may be in it.

    Raises:
        ValueError: the picture is smaller than 64 px, where shapes cannot be distinguished.
    """
    if min(picture.shape[:2]) < SIDE:
        raise ValueError(f"{picture.shape[1]} x {picture.shape[0]} px: give at least {SIDE} px")
    if picture.shape[:2] != (SIDE, SIDE):
        small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
        picture = np.asarray(small)
    pixels = picture.astype(np.float32)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(frame, axis=0)
    if written:
        pixels[SIDE * WRITTEN.start // 32 : SIDE * WRITTEN.stop // 32] = ground
    background = _nearest(ground, BACKGROUNDS, GROUND_RADIUS)
    if background is None:
        return Recognition(None, (), float("inf"))
    objects, rest, templates = [], pixels - ground, _templates(novel)
    for region, window, own in _regions(pixels, ground):
        color = np.median(pixels[_core(region)], axis=0)
        name = _nearest(color, COLORS, COLOR_RADIUS)
        if name and (
            best := _match(_coverage(pixels[window], ground, color) * own, window, *templates)
        ):
            d = best.diameter / SIDE
            x, y = best.x / SIDE, best.y / SIDE
            objects.append(Object(name, best.template.name, _size(d), x, y, d))
            distance = _distance(best.template.shape, best.x, best.y, best.diameter, window)
            rest[window] -= (distance < 0)[..., None] * (color - ground)
            rest[window] *= (abs(distance) > EDGE)[..., None]
    unexplained = ndimage.gaussian_filter(rest, (2, 2, 0)) @ LUMA_CHROMA.T
    return Recognition(background, tuple(objects), float(np.linalg.norm(unexplained, axis=2).max()))


def _nearest(color: Color, names: Mapping[str, tuple[int, int, int]], radius: float) -> str | None:
    distances = {name: np.linalg.norm(color - np.array(rgb)) for name, rgb in names.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= radius else None


def _regions(
    pixels: Pixels, ground: Color
) -> Iterator[tuple[Bool[np.ndarray, "64 64"], Window, Bool[np.ndarray, "h w"]]]:
    """Connected components of pixels nearer to some object colour than to the background.

    Yields each component's mask, a window around it, and the pixels of the window that are nearer
    to it than to other components.
    """
    candidates = np.array([ground, *COLORS.values()], dtype=np.float32)
    nearest = np.square(pixels[:, :, None] - candidates).sum(3).argmin(2)
    labels, count = ndimage.label(nearest > 0)
    if not count:
        return
    i, j = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    owners = labels[i, j]
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        region = labels == number
        if region.sum() >= AREA:
            window = tuple(slice(max(0, s.start - 4), min(SIDE, s.stop + 4)) for s in box)
            yield region, window, owners[window] == number


def _core(region: Bool[np.ndarray, "64 64"]) -> Bool[np.ndarray, "64 64"]:
    """A region without its boundary pixels; the whole region if it has no others."""
    core = ndimage.binary_erosion(region)
    return core if core.any() else region


def _coverage(part: Float[np.ndarray, "h w 3"], ground: Color, color: Color) -> Part:
    """Coverage of each pixel by an object: 0 at the background's colour, 1 at the object's."""
    axis = LUMA_CHROMA.T @ LUMA_CHROMA @ (color - ground)
    return (part - ground) @ axis / ((color - ground) @ axis)


def _match(
    coverage: Part, window: Window, known: Sequence[Template], morphed: Sequence[Template]
) -> Match | None:
    """The known shape that best matches a region; None if no known shape clearly does.

    A template is placed and scaled to the region's centroid and area, which a blur does not change.
    """
    area = max(float(coverage.sum()), 1.0)
    x, y = (float(coverage.sum(i) @ c) / area for i, c in enumerate(_centres(window)))
    soft = _blurred(coverage, BLURS[0])

    def fit(template: Template, blurs: Sequence[float]) -> Match:
        d = (area / template.area) ** 0.5
        place = (x - d * template.x, y - d * template.y, d)
        sharp = np.clip(0.5 - _distance(template.shape, *place, window), 0, 1)
        misfits = [np.square(soft - _blurred(sharp, blur)).sum() / area for blur in blurs]
        misfit, blur = min(zip(misfits, blurs))
        return Match(float(misfit), blur, template, *place)

    best = min((fit(template, BLURS) for template in known), key=lambda match: match.misfit)
    low, high = (SIDE * d for d in DIAMETERS)
    if best.misfit > MISFIT or not low <= best.diameter <= high:
        return None
    rivals = (fit(template, [best.blur]) for template in morphed)
    return None if any(rival.misfit < best.misfit for rival in rivals) else best


def _blurred(part: Part, sigma: float) -> Part:
    """Gaussian blur, with zeros outside."""
    h, w = part.shape
    return GAUSSIAN[sigma][:h, :h] @ part @ GAUSSIAN[sigma][:w, :w]


def _distance(shape: Shape, x: float, y: float, diameter: float, window: Window) -> Part:
    """Signed distance in pixels from each pixel's centre to a shape's outline, negative inside."""
    u, v = _centres(window)
    return diameter * shape((u[None] - x) / diameter, (v[:, None] - y) / diameter)


def _centres(window: Window) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, " h"]]:
    rows, columns = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in window)
    return columns, rows


def _size(diameter: float) -> str:
    for name, (low, high) in SIZES.items():
        if low - SIZE_MARGIN <= diameter <= high + SIZE_MARGIN:
            return name
    return "medium" if diameter < SIZES["large"][0] else "huge"


def judge(scene: Scene, picture: UInt8[np.ndarray, "h w 3"]) -> dict[str, bool]:
    """Whether a picture shows what the short caption of a scene asks for, by criterion.

    * `objects`: the colours, and separately the shapes, occur as often as in the scene.
    * `binding`: the pairs of colour and shape do.
    * `relations`: both objects are present, and one is in the direction from the other that the
      relation names, within 45 degrees; true if the caption names no relation.
    * `counts`: there are as many objects as in the scene.
    * `whole`: all of these, with the sizes that the caption names.

    Every criterion is false if the recognized objects do not explain the picture. A word that is
    written in the scene is not looked for.
    """
    novel = frozenset(o.shape for o in scene.objects if o.shape in NOVEL)
    recognized = recognize(picture, scene.word is not None, novel)
    if not recognized.clean:
        return dict.fromkeys(("objects", "binding", "relations", "counts", "whole"), False)
    found, asked = recognized.objects, scene.objects

    def same(*attributes: str) -> bool:
        counts = [
            Counter(tuple(getattr(o, a) for a in attributes) for o in s) for s in (found, asked)
        ]
        return counts[0] == counts[1]

    binding, relations = same("color", "shape"), _related(scene, found)
    sizes = not scene.names_size or same("color", "shape", "size")
    return {
        "objects": same("color") and same("shape"),
        "binding": binding,
        "relations": relations,
        "counts": len(found) == len(asked),
        "whole": binding and relations and sizes,
    }


def _related(scene: Scene, found: tuple[Object, ...]) -> bool:
    if not scene.relation:
        return True
    wanted = [(o.color, o.shape) for o in scene.objects]
    pair = [[o for o in found if (o.color, o.shape) == w] for w in wanted]
    if [len(objects) for objects in pair] != [1, 1]:
        return False
    (first,), (second,) = pair
    offset = np.array([first.x - second.x, first.y - second.y])
    toward = np.array(RELATIONS[scene.relation][0])
    return bool(offset @ toward > abs(offset @ toward[::-1]))
