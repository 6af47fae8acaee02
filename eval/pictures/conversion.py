"""Decoding pictures of measured sets by `cascade.formats.rgb`, with a note of each conversion.

Files that hold several pictures, or that would need excessive memory or time, are rejected with
`BadSample`, whose message is the end of a sentence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cascade.formats import rgb
from cascade.formats.rgb import CONVERTIBLE, MAX_PIXELS, MAX_SCANS, BadSample

GREY, PALETTE, DEEP = "grey, made RGB", "palette, made RGB", "16 bits, made 8"
TRANSPARENT, TURNED = "transparent, laid on white", "turned as EXIF says"
_SENTENCES = {
    "huge picture": f"has more than {MAX_PIXELS:,} pixels: save it smaller",
    "too many scans": f"has more than {MAX_SCANS} scans: save it again",
    "broken picture": "is broken, or no picture that is read here: save it as PNG",
    rgb.FOREIGN: "is of a format that is not read: save it as PNG",
    "values without a white": "has values that may be of any range: save it with 8 bits",
}


class Look(NamedTuple):
    """What the header tells: (height, width) when upright, the format, and conversions."""

    size: tuple[int, int]
    format: str
    notes: tuple[str, ...]


def look(data: bytes, stated: int | None = None) -> Look:
    """The `Look` of a picture, which is decoded only if the header does not suffice.

    Args:
        stated: see `rgb.orientation`.

    Raises:
        BadSample: `pixels` would reject the file before decoding, or it holds several pictures.
    """
    with _sentences():
        image = rgb.opened(data, CONVERTIBLE)
        if rgb.several(image):
            raise BadSample("holds several pictures: save the one that counts")
        turn, (w, h) = rgb.orientation(image, stated), image.size
        notes = (*_notes(image, data), *([TURNED] if turn > 1 else []))
        return Look((w, h) if turn > 4 else (h, w), rgb.format_of(image), notes)


def pixels(
    data: bytes, square: int | None = None, stated: int | None = None
) -> UInt8[np.ndarray, "3 h w"]:
    """The picture, or its centred square resized to `square` pixels (Pillow's bicubic).

    Raises:
        BadSample: the file is no picture, broken or huge.
    """
    with _sentences():
        picture = rgb.picture(data, CONVERTIBLE, stated)
    if square:
        h, w, _ = picture.shape
        side, left, top = min(w, h), (w - min(w, h)) // 2, (h - min(w, h)) // 2
        # Crop first: with `resize(box=...)`, pixels outside of the box would contribute.
        cut = Image.fromarray(picture[top : top + side, left : left + side])
        picture = np.asarray(cut.resize((square, square), Image.Resampling.BICUBIC))
    return picture.transpose(2, 0, 1)


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except BadSample as reason:
        raise BadSample(_SENTENCES.get(str(reason), str(reason))) from reason


def _notes(image: Image.Image, data: bytes) -> Iterator[str]:
    """The conversions that `rgb.rgb` applies to a picture that is not 8-bit RGB."""
    if image.has_transparency_data:
        yield TRANSPARENT
    elif image.mode in ("1", "L") or image.mode.startswith("I"):
        yield GREY
    elif image.mode == "P":
        yield PALETTE
    elif image.mode != "RGB":
        yield f"{image.mode}, made RGB"
    if image.mode.startswith("I") or (image.format == "PNG" and data[24] > 8):
        yield DEEP
