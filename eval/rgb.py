"""From the bytes of a JPEG, PNG or WebP file to 8-bit RGB, and what was converted on the way.

Grey and palettes become RGB, transparency is laid on white, and a picture is turned as its EXIF
says: each is noted. What would be lost on the way to 8-bit RGB is refused, as are files that ask
for more memory or time than a picture needs. `BadSample` holds the end of a sentence.
"""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from cascade.data.transforms import MAX_PIXELS, MAX_SCANS, BadSample

GREY, PALETTE = "grey, made RGB", "palette, made RGB"
TRANSPARENT, TURNED = "transparent, laid on white", "turned as EXIF says"
_MODES = {"RGB": None, "RGBA": None, "LA": None, "PA": None, "L": GREY, "1": GREY, "P": PALETTE}


class Look(NamedTuple):
    """What the header says: (height, width) when upright, the format, and what is converted."""

    size: tuple[int, int]
    format: str
    notes: tuple[str, ...]


def look(data: bytes) -> Look:
    """Raises BadSample for what `pixels` would refuse without decoding."""
    return _opened(data)[1]


def pixels(data: bytes, square: int | None = None) -> UInt8[np.ndarray, "3 h w"]:
    """The picture; or its centred square at `square` pixels, anti-aliased bicubic (Pillow's).

    Raises:
        BadSample: no picture, a broken or animated one, one of 16 bits or of another colour space,
            or a huge one.
    """
    image, (_, _, notes) = _opened(data)
    try:
        if TURNED in notes:
            image = ImageOps.exif_transpose(image)
        if TRANSPARENT in notes:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        image = image.convert("RGB")
    except Exception as error:  # on hostile bytes the decoders raise nearly anything
        raise BadSample("is broken: make it again") from error
    if square:
        w, h = image.size
        side, left, top = min(w, h), (w - min(w, h)) // 2, (h - min(w, h)) // 2
        # Cut first: with resize's own `box`, pixels outside of it would have a say.
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((square, square), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _opened(data: bytes) -> tuple[Image.Image, Look]:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        notes = _notes(image, data)
        w, h = image.size
        if TURNED in notes and image.getexif()[ExifTags.Base.Orientation] > 4:
            w, h = h, w
        return image, Look((h, w), image.format or "", notes)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"has more than {MAX_PIXELS:,} pixels: save it smaller") from error
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("is broken, or no picture: make it again") from error


def _notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"has more than {MAX_PIXELS:,} pixels: save it smaller")
    if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadSample(f"has more than {MAX_SCANS} scans: save it again")
    if getattr(image, "n_frames", 1) > 1:
        raise BadSample("holds several pictures: save the one that counts")
    if image.format == "PNG" and data[24] > 8:  # Pillow would cut colours to 8 bits
        raise BadSample(f"has {data[24]} bits a channel: save it with 8")
    if image.mode not in _MODES:
        raise BadSample(f"is {image.mode}, not RGB: convert it as you mean it")
    notes = [TRANSPARENT if image.has_transparency_data else _MODES[image.mode]]
    # Where a PNG has it behind the pixels, Pillow would decode them all to look.
    if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        notes.append(TURNED)
    return tuple(note for note in notes if note)
