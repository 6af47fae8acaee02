"""Decodes picture files to upright 8-bit RGB. Everything that reads pictures does it here.

Grey, palettes and other colour modes become RGB, transparency is blended with white, and 16 bits
are scaled to 8 (for 16-bit colours Pillow keeps the upper byte, at most one level less). Pictures
are rotated by their EXIF, or else XMP, orientation, as Pillow reads it. Data after the end of a
picture, such as the video of a phone's motion photo, is ignored.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cascade.errors import UserError, explained

log = logging.getLogger(__name__)

MAX_PIXELS = 50_000_000
MAX_SCANS = 100  # of a JPEG. Progressive ones have about 10; each decodes the whole picture
MAX_SEGMENTS = 10_000  # of a JPEG. A profile or depth map of 64 MB has a thousand

FORMATS = ("JPEG", "PNG", "WEBP")  # in shards
CONVERTIBLE = (*FORMATS, "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
ENDINGS = {  # file name extensions that are read
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "avifs", "bmp", "dib"),
    *("gif", "jp2", "j2k", "jpc", "jpf", "jpx", "pbm", "pgm", "ppm", "pnm", "tif", "tiff"),
}
UNREAD = {  # extensions of other pictures, which are not
    *("heic", "heif", "hif", "jxl", "jxr", "wdp", "exr", "hdr", "psd", "xcf", "svg", "svgz", "ico"),
    *("tga", "pcx", "dds", "qoi", "eps", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf"),
}
FOREIGN = "format that is not read"

# First bytes of files that are read, and of other pictures.
_READ = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8[79]a|II\*\0|MM\0\*|....ftypavi[fs]"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n|BM....\0\0\0\0....[\x0c\x28\x6c\x7c]\0\0\0",
    re.DOTALL,
)
_UNREAD = re.compile(
    rb"....ftyp(?:heic|heix|hevc|heim|heis|mif1|msf1)|\xff\x0a|\0\0\0\x0cJXL \r\n|8BPS\0|v/1\x01",
    re.DOTALL,
)
# A marker of a JPEG: not a stuffed byte, a restart or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START, _END, _SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
# Chunks that may give a PNG's orientation, before or after its pixels.
_TURNS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


# Pillow warns of huge pictures. They are refused here, so the warning is redundant.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BadSample(Exception):
    """A sample that cannot be used. The message is a short reason, by which samples are counted."""


@contextmanager
def reasons() -> Iterator[None]:
    """Turns the decoders' errors, which can be of any kind on hostile bytes, into BadSample."""
    try:
        yield
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("huge picture") from error
    except Exception as error:
        raise BadSample("broken picture") from error


def opened(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Opens a picture; pixels are decoded only if its orientation may follow them.

    Raises:
        BadSample: another format, a broken picture, over `MAX_PIXELS`, or over `MAX_SCANS`.
    """
    with reasons():
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError:
            raise BadSample(FOREIGN if _UNREAD.match(data) else "broken picture") from None
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("huge picture")
        if isinstance(image, JpegImageFile) and scans(data) > MAX_SCANS:
            raise BadSample("too many scans")
        if image.format == "PNG":
            _mend_transparency(image, depth=data[24])
            pixels = data.find(b"IDAT")
            if any(data.find(mark, pixels) >= 0 for mark in _TURNS):
                image.load()  # reads the chunks after the pixels
    return image


def scans(jpeg: bytes) -> int:
    """An upper bound on the scans of a JPEG; `MAX_SCANS` + 1 if there are more.

    Counting all start-of-scan markers is fast. Only if there are too many are segments walked, as
    libjpeg does, so that scans inside a segment, such as a thumbnail's, do not count.
    """
    x = np.frombuffer(jpeg, np.uint8)
    marks = int(np.count_nonzero((x[:-1] == 0xFF) & (x[1:] == _SCAN)))
    if marks <= MAX_SCANS:
        return marks
    count, at = 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(jpeg, at)
        if not found or (kind := jpeg[found.start() + 1]) == _END:
            return count
        at = found.end()
        if kind == _SCAN:
            count += 1
            if count > MAX_SCANS:
                return count
        if kind not in (_START, _TEMPORARY):
            at += max(2, int.from_bytes(jpeg[at : at + 2]))
    return MAX_SCANS + 1


def _mend_transparency(png: Image.Image, depth: int) -> None:
    """Scales the transparent colour in the way Pillow scales the pixels."""
    key = png.info.get("transparency")
    if png.mode == "L" and isinstance(key, int):
        top = 2**depth - 1
        png.info["transparency"] = (key & top) * 255 // top
    elif png.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        png.info["transparency"] = tuple(value >> 8 for value in key)


def rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB, not rotated yet. Raises BadSample if the value of white is unknown.

    Call it within `reasons`, because it may be the first to decode the picture.
    """
    if image.mode.startswith("I"):
        image = _grey(image)
    elif image.mode == "F":
        raise BadSample("values without a white")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits, where Pillow would clip."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # 32 bits, or negative ones
        raise BadSample("values without a white")
    values = np.asarray(image).astype(np.int32)
    grey = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def orientation(image: Image.Image, stated: int | None = None) -> int:
    """The EXIF orientation of an opened picture, 1 to 8; 1: upright.

    Args:
        stated: orientation given elsewhere, used if the file itself has none.
    """
    if image.format == "TIFF":  # Pillow rotates these itself
        return 1
    try:
        own = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata does not make the picture unusable
        own = None
    value = stated if own is None else own
    return value if value in range(2, 9) else 1


def sides(data: bytes, stated: int | None = None) -> tuple[int, int]:
    """The height and width of a picture once it is upright, from its header.

    `stated`: see `orientation`. Raises BadSample as `opened`.
    """
    image = opened(data)
    width, height = image.size
    return (width, height) if orientation(image, stated) > 4 else (height, width)


def upright(stored: UInt8[np.ndarray, "h w c"], orientation: int) -> UInt8[np.ndarray, "y x c"]:
    """Rotates and mirrors a picture by its EXIF orientation."""
    if orientation == 1:
        return stored
    mirrored = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (0,), 7: (0, 1), 8: (1,)}[orientation]
    turned = np.flip(stored, mirrored)
    return np.ascontiguousarray(turned.swapaxes(0, 1) if orientation > 4 else turned)


def picture(
    data: bytes, formats: Sequence[str] = FORMATS, stated: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a picture, upright. `stated`: see `orientation`. Raises BadSample as `opened`."""
    image = opened(data, formats)
    with reasons():
        turn = orientation(image, stated)
        return upright(np.asarray(rgb(image)), turn)


def read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a picture of any format in `CONVERTIBLE`, upright. UserError if it cannot be used."""
    with explained(f"cannot read {path}"):
        data = path.read_bytes()
    try:
        return picture(data, CONVERTIBLE)
    except BadSample as reason:
        raise UserError(
            f"{path}: {reason}. Give one of {', '.join(CONVERTIBLE)}, of at most {MAX_PIXELS:,} "
            "pixels"
        ) from None


def format_of(image: Image.Image) -> str:
    """The format of a picture; "JPEG" also for a JPEG followed by a second one (MPO)."""
    return "JPEG" if isinstance(image, JpegImageFile) else image.format or ""


def several(image: Image.Image) -> bool:
    """Whether a file holds several pictures; those after a JPEG do not count."""
    with reasons():
        return not isinstance(image, JpegImageFile) and getattr(image, "is_animated", False)


def ending(name: str) -> str:
    """The extension in lower case: "jpg" of "a.b/photo.JPG"; "" if there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_picture(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is a picture, supported or not: by its extension, or first 32 bytes."""
    if (kind := ending(name)) in ENDINGS or kind in UNREAD:
        return True
    if kind in ("txt", "json"):
        return False
    first = head()
    return bool(_READ.match(first) or _UNREAD.match(first))


def suspicious(picture: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether over 95 % of the pixels are white, as when 16-bit values are clipped at 255."""
    some = picture[:: max(1, len(picture) // 16), :: max(1, picture.shape[1] // 16)]
    if np.count_nonzero(some == 255) < 0.8 * some.size:  # cheap, and nearly always suffices
        return False
    return float((picture == 255).all(-1).mean()) > 0.95


def warn_of_white(where: object, names: Sequence[str], count: int) -> None:
    """Logs how many of `count` pictures are nearly white, if any; `names` are theirs."""
    if names:
        log.warning(
            "%s: %d of %d pictures are nearly all white, such as %s (as img2dataset makes 16-bit "
            "pictures): look at them",
            *(where, len(names), count, names[0]),
        )
