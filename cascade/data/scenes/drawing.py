"""Draws flat shapes on a flat background, anti-aliased by coverage, at any resolution.

A shape is a signed distance function on the unit box: x to the right, y down, both in [-1/2, 1/2],
negative inside. Coverage is the clipped distance in pixels, on a grid of at least 256 px that is
averaged down, so that a small picture is the area average of a large one.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8

Shape = Callable[[Float[np.ndarray, "1 w"], Float[np.ndarray, "h 1"]], Float[np.ndarray, "h w"]]

# Far apart, and the mean of any two is far from every third: a blend matches no named colour.
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 48, 31),
    "green": (50, 165, 60),
    "blue": (24, 75, 208),
    "yellow": (246, 196, 20),
    "purple": (140, 25, 170),
    "cyan": (44, 204, 236),
    "black": (20, 30, 36),
    "pink": (250, 110, 160),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (246, 246, 244),
    "gray": (212, 212, 210),
    "cream": (240, 222, 190),
    "sky": (196, 214, 238),
}


def circle(x, y):
    return np.sqrt(x * x + y * y) - 0.5


def square(x, y):
    return np.maximum(abs(x), abs(y)) - 0.5


def triangle(x, y):
    """A triangle on its base, as wide as high."""
    return np.maximum((2 * abs(x) - y - 0.5) / math.sqrt(5), y - 0.5)


def cross(x, y):
    """An upright cross; its arms are 0.3 wide."""
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 0.5, np.minimum(x, y) - 0.15)


def star(x, y):
    """A star of five points, one up; the points reach twice as far as the corners between them."""
    fifth = 2 * math.pi / 5
    angle = abs((np.arctan2(x, -y) / fifth + 0.5) % 1 - 0.5) * fifth  # from the nearest point
    radius = np.sqrt(x * x + y * y)
    corner = (0.25 * math.cos(fifth / 2), 0.25 * math.sin(fifth / 2))
    across, along = corner[1], 0.5 - corner[0]
    side = (radius * np.cos(angle) - 0.5) * across + radius * np.sin(angle) * along
    return side / math.hypot(across, along)


def heart(x, y):
    """A heart: two circles on the upper sides of a square standing on its corner."""
    side = 2 / (2 + math.sqrt(2))
    x, y = abs(x), y - 0.5 + side / math.sqrt(2)
    tip = (x + abs(y)) / math.sqrt(2) - side / 2
    lobe = side / math.sqrt(8)
    return np.minimum(tip, np.sqrt((x - lobe) ** 2 + (y + lobe) ** 2) - side / 2)


SHAPES: Mapping[str, Shape] = {
    shape.__name__: shape for shape in (circle, square, triangle, cross, star, heart)
}


def blicket(x, y):
    """A thick L: a bar on the left and one below."""
    left = np.maximum(abs(x + 0.29) - 0.21, abs(y) - 0.5)
    return np.minimum(left, np.maximum(abs(x) - 0.5, abs(y - 0.29) - 0.21))


# Of no level, so that no model knows them: to be learned from a few pictures.
NOVEL: Mapping[str, Shape] = {"blicket": blicket}

# The letters of the shapes' names, in rows of cells from the top.
LETTERS: Mapping[str, str] = {
    "a": "010 101 111 101 101",
    "c": "011 100 100 100 011",
    "e": "111 100 110 100 111",
    "g": "011 100 101 101 011",
    "h": "101 101 111 101 101",
    "i": "111 010 010 010 111",
    "l": "100 100 100 100 111",
    "n": "110 101 101 101 101",
    "o": "010 101 101 101 010",
    "q": "010 101 101 110 011",
    "r": "110 101 110 101 101",
    "s": "011 100 010 001 110",
    "t": "111 010 010 010 010",
    "u": "101 101 101 101 111",
}
WRITTEN = slice(25, 32)  # of 32 rows of a picture: where a word is written, with a margin


def blank(background: str, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Return a picture of the background alone."""
    return np.full((size, size, 3), BACKGROUNDS[background], dtype=np.uint8)


def paint(
    picture: UInt8[np.ndarray, "s s 3"],
    shape: Shape,
    color: tuple[int, int, int],
    x: float,
    y: float,
    diameter: float,
    opacity: float = 1.0,
) -> None:
    """Paint a shape onto a picture, in place.

    Args:
        x, y, diameter: centre and side of the shape's box, as fractions of the picture's side.
    """
    size = len(picture)
    k = -(-256 // size)
    (top, bottom), (left, right) = (_span(middle, diameter, size) for middle in (y, x))
    grid = [
        ((np.arange(a * k, b * k, dtype=np.float32) + 0.5) / (k * size) - middle) / diameter
        for (a, b, middle) in ((top, bottom, y), (left, right, x))
    ]
    distance = shape(grid[1][None], grid[0][:, None]) * (diameter * k * size)
    cover = np.clip(0.5 - distance, 0, 1)
    cover = cover.reshape(bottom - top, k, right - left, k).mean((1, 3), keepdims=True)[:, 0]
    part = picture[top:bottom, left:right]
    part[:] = np.rint(part + opacity * cover * (np.array(color, dtype=np.float32) - part))


def write(picture: UInt8[np.ndarray, "s s 3"], word: str, color: tuple[int, int, int]) -> None:
    """Write a word along the lower edge of a picture, in place, in letters of 3 x 5 cells.

    A cell is 1/32 of the side, so that the letters are still sharp at 32 px.

    Raises:
        ValueError: the word is too long, or has a letter that no shape's name has.
    """
    size, columns = len(picture), 4 * len(word) - 1
    if columns > 32 or not {*word} <= LETTERS.keys():
        raise ValueError(f"{word!r} cannot be written: give at most 8 of {''.join(LETTERS)}")
    cells = np.zeros((32, 32), dtype=np.float32)
    for i, letter in enumerate(word):
        left = (32 - columns) // 2 + 4 * i
        bits = [[int(bit) for bit in row] for row in LETTERS[letter].split()]
        cells[WRITTEN.start + 1 : WRITTEN.stop - 1, left : left + 3] = bits
    k = -(-256 // size)
    place = (np.arange(k * size) * 32) // (k * size)
    cover = cells[place][:, place].reshape(size, k, size, k).mean((1, 3))[..., None]
    picture[:] = np.rint(picture + cover * (np.array(color, dtype=np.float32) - picture))


def _span(middle: float, diameter: float, size: int) -> tuple[int, int]:
    """Return the range of pixels that a box may touch along one axis."""
    low, high = (middle - diameter / 2) * size, (middle + diameter / 2) * size
    return max(0, math.floor(low) - 1), min(size, math.ceil(high) + 1)
