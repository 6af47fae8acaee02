"""Claims about pictures: upright and 8-bit RGB, in training, packing and evaluation alike.

The right values are made from EXIF's own definition of an orientation (which side of the picture
the first row and the first column are), by a writer that knows nothing of the reader.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cascade.data.tars.pack import fitted
from cascade.data.transforms import BadSample, decode
from cascade.eval.pictures.conversion import DEEP, GREY, PALETTE, TRANSPARENT, TURNED, look, pixels
from cascade.formats import rgb

H, W = 21, 32  # an odd difference, so that the centre is off the middle

# The visual sides at which the first row and the first column of the file are: EXIF 2.3, 4.6.4 A.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright, orientation):
    """The rows of a file with this orientation."""
    row, column = SIDES[orientation]
    x = upright.swapaxes(0, 1) if row in ("left", "right") else upright
    x = x[::-1] if row in ("bottom", "right") else x
    return np.ascontiguousarray(x[:, ::-1] if column in ("bottom", "right") else x)


def exif(orientation):
    entry = struct.pack("<HHHII", 1, 0x0112, 3, 1, orientation)
    return b"Exif\0\0II*\0\x08\0\0\0" + entry + b"\0\0\0\0"


def smooth(h=H, w=W, channels=3):
    """Unlike in all corners, and such as JPEG keeps."""
    y, x = np.mgrid[:h, :w] / (max(h, w) - 1)
    planes = [200 * x, 250 * y, 250 - 120 * x - 90 * y, 40 + 200 * x * y]
    return np.stack(planes[:channels], -1).round().astype(np.uint8)


def coded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows, depth, colour, *before, after=b""):
    """A PNG of packed rows, by hand: Pillow writes neither 16 bits of colour nor 2 of grey."""
    h, w = rows.shape[:2]
    if depth < 8:
        bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(h, -1).astype(np.uint8), 1)
    data = b"".join(
        b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in rows
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    body = [head, *before, chunk(b"IDAT", zlib.compress(data)), after, chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def on_white(colour, alpha):
    a = alpha[..., None] / 255
    return (colour * a + 255 * (1 - a)).round()


def grey(x):
    return np.repeat(x[..., None], 3, -1)


def of_pillow(form, mode=None, **options):
    return lambda x, tag: coded(Image.fromarray(x, mode), form, exif=tag, **options)


def by_hand(depth, colour):
    return lambda x, tag: png(x, depth, colour, chunk(b"eXIf", tag[6:]))


def palette(clear=None):
    def write(x, tag):
        image = Image.fromarray(x, "P")
        image.putpalette(PALETTE_OF.tobytes())
        return coded(image, "PNG", exif=tag, **({} if clear is None else {"transparency": clear}))

    return write


def cmyk(x, tag):
    return coded(Image.fromarray(255 - x, "CMYK"), "JPEG", exif=tag, quality=100, subsampling=0)


RGB, RGBA = smooth(), smooth(channels=4)
L, A = RGB[..., 0], RGBA[..., 3]
INDEX = L // 4
PALETTE_OF = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
CLEAR = np.where((INDEX == 7)[..., None], 255, PALETTE_OF[INDEX])
LA = np.stack([L, A], -1)
DEEP_GREY = 257 * L.astype(np.uint16) + 100
DEEP_RGB = 257 * RGB.astype(np.uint16) + 100
KEYLESS = {"quality": 100, "subsampling": 0}
BLACKLESS = np.concatenate([RGB, np.full((H, W, 1), 255, np.uint8)], -1)  # 255 - 255: no black

# What lies in the file, its writer, the right picture, and by how much a value may differ.
KINDS = {
    "PNG 1": (L // 128, by_hand(1, 0), grey(L // 128 * 255), 0),
    "PNG L": (L, of_pillow("PNG"), grey(L), 0),
    "PNG LA": (LA, of_pillow("PNG"), on_white(grey(L), A), 1),
    "PNG P": (INDEX, palette(), PALETTE_OF[INDEX], 0),
    "PNG P, one colour clear": (INDEX, palette(7), CLEAR, 0),
    "PNG RGB": (RGB, of_pillow("PNG"), RGB, 0),
    "PNG RGBA": (RGBA, of_pillow("PNG"), on_white(RGB, A), 1),
    "PNG of 16 bits of grey": (DEEP_GREY, by_hand(16, 0), grey((DEEP_GREY / 257).round()), 0),
    "PNG of 16 bits of RGB": (DEEP_RGB, by_hand(16, 2), (DEEP_RGB / 257).round(), 1),
    "JPEG L": (L, of_pillow("JPEG", quality=100), grey(L), 2),
    "JPEG RGB": (RGB, of_pillow("JPEG", **KEYLESS), RGB, 4),
    "JPEG CMYK": (BLACKLESS, cmyk, RGB, 4),
    "WebP RGB": (RGB, of_pillow("WEBP", lossless=True), RGB, 0),
    "WebP RGBA": (RGBA, of_pillow("WEBP", lossless=True, exact=True), on_white(RGB, A), 1),
}


def differ(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(float) - b).max()


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_in_every_orientation_is_the_upright_picture_everywhere(kind, orientation):
    rows, write, right, tolerance = KINDS[kind]
    data = write(stored(rows, orientation), exif(orientation))
    picture = rgb.picture(data)
    assert differ(picture, right) <= tolerance
    np.testing.assert_array_equal(pixels(data).transpose(1, 2, 0), picture)
    assert look(data).size == (H, W)
    lossless = coded(Image.fromarray(picture), "PNG")
    assert differ(decode(data, 8, scaled=False), decode(lossless, 8)) <= 1
    assert differ(pixels(data, 8), pixels(lossless, 8)) <= 1
    smaller = fitted(data, 16)
    assert smaller.size == (24, 16)
    again = rgb.picture(smaller.data) - rgb.picture(fitted(lossless, 16).data).astype(float)
    assert np.abs(again).mean() < 4  # a JPEG is packed as one


def test_what_was_converted_is_noted():
    notes = {kind: look(write(rows, exif(6))).notes for kind, (rows, write, *_) in KINDS.items()}
    assert all(TURNED in found for found in notes.values())
    said = {kind: set(found) - {TURNED} for kind, found in notes.items()}
    assert said == {
        **{kind: set() for kind in ("PNG RGB", "JPEG RGB", "WebP RGB")},
        **{kind: {GREY} for kind in ("PNG 1", "PNG L", "JPEG L")},
        **{kind: {TRANSPARENT} for kind in ("PNG LA", "PNG RGBA", "WebP RGBA")},
        "PNG P": {PALETTE},
        "PNG P, one colour clear": {TRANSPARENT},
        "PNG of 16 bits of grey": {GREY, DEEP},
        "PNG of 16 bits of RGB": {DEEP},
        "JPEG CMYK": {"CMYK, made RGB"},
    }


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    right = np.round(values.astype(float) * 255 / 65535)
    for data in (png(values, 16, 0), coded(Image.fromarray(values), "TIFF")):
        np.testing.assert_array_equal(rgb.picture(data, rgb.CONVERTIBLE)[..., 1], right)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_any_depth_is_white(depth):
    """Pillow scales the pixels of 2 and 4 bits, and not the value that stands for transparent."""
    values = np.arange(16).reshape(4, 4) % 2**depth
    data = png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", 1)))
    scaled = np.round(values * 255 / (2**depth - 1))
    np.testing.assert_array_equal(rgb.picture(data)[..., 0], np.where(values == 1, 255, scaled))


def test_the_transparent_colour_of_sixteen_bits_is_white():
    values = np.full((2, 2, 3), 0x1234)
    values[0, 0] = 0xFFFF, 0x8080, 0
    data = png(values, 16, 2, chunk(b"tRNS", struct.pack(">3H", *[0x1234] * 3)))
    assert rgb.picture(data).tolist() == [[[255, 128, 0], [255] * 3], [[255] * 3] * 2]


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
LYING = stored(RGB, 6)
ELSEWHERE = {
    "EXIF behind the pixels": png(LYING, 8, 2, after=chunk(b"eXIf", exif(6)[6:])),
    "XMP": png(LYING, 8, 2, ITXT),
    "XMP behind the pixels": png(LYING, 8, 2, after=ITXT),
    "XMP of a WebP": coded(Image.fromarray(LYING), "WEBP", lossless=True, xmp=XMP),
    "EXIF against XMP": png(RGB, 8, 2, ITXT, chunk(b"eXIf", exif(1)[6:])),
    "a TIFF": coded(Image.fromarray(LYING), "TIFF", tiffinfo={0x0112: 6}),
    "an AVIF": coded(
        Image.fromarray(LYING), "AVIF", quality=100, subsampling="4:4:4", exif=exif(6)
    ),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_an_orientation_is_found_where_it_stands(where):
    data = ELSEWHERE[where]
    assert differ(rgb.picture(data, rgb.CONVERTIBLE), RGB) <= 4
    np.testing.assert_array_equal(
        pixels(data).transpose(1, 2, 0), rgb.picture(data, rgb.CONVERTIBLE)
    )
    assert look(data).size == (H, W)
    if not where.startswith("a"):
        assert differ(decode(data, 8), decode(coded(Image.fromarray(RGB), "PNG"), 8)) <= 1


def test_what_is_stated_elsewhere_counts_if_the_file_says_nothing():
    plain, says_6 = (coded(Image.fromarray(LYING), "PNG", **o) for o in ({}, {"exif": exif(6)}))
    for data, stated, right in ((plain, 6, RGB), (plain, None, LYING), (says_6, 3, RGB)):
        np.testing.assert_array_equal(rgb.picture(data, stated=stated), right)
        np.testing.assert_array_equal(pixels(data, stated=stated).transpose(1, 2, 0), right)
        assert look(data, stated).size == right.shape[:2]
        assert (
            differ(decode(data, 8, stated=stated), decode(coded(Image.fromarray(right), "PNG"), 8))
            <= 1
        )


@pytest.mark.parametrize("tag", [exif(9), exif(0), exif(6)[:20], b"Exif\0\0junk"])
def test_a_senseless_orientation_is_none(tag):
    data = coded(Image.fromarray(RGB), "PNG", exif=tag)
    np.testing.assert_array_equal(rgb.picture(data), RGB)
    assert look(data).notes == ()


# What stands behind a JPEG, or within its segments

JPEG = coded(Image.fromarray(RGB), "JPEG", quality=95)
MANY = b"\xff\xda" * 300
FILM = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + MANY
SECOND = [Image.fromarray(smooth(channels=3)) for _ in range(120)]


def within(kind, body):
    return JPEG[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


AROUND = {
    "a film": JPEG + FILM,
    "a maker's trailer": JPEG + MANY + b"SEFH\0\0\0\0SEFT",
    "scans in a comment": within(0xFE, MANY),
    "scans in the EXIF's thumbnail": within(0xE1, exif(1) + MANY + b"\xff\xd9"),
    "120 more pictures": coded(SECOND[0], "MPO", save_all=True, append_images=SECOND),
    "fill bytes": JPEG[:-2] + b"\xff" * 9 + JPEG[-2:] + FILM,
}


@pytest.mark.parametrize("where", AROUND)
def test_what_is_around_a_jpeg_is_no_part_of_it(where):
    data = AROUND[where]
    assert differ(rgb.picture(data), rgb.picture(JPEG)) <= 9  # an MPO has another quality
    assert decode(data, 16).shape == (16, 16, 3)
    assert look(data).format == "JPEG"
    assert fitted(data) == ("jpg", data, (W, H), (W, H))


@pytest.mark.parametrize(
    "more",
    [
        lambda scan: scan * rgb.MAX_SCANS,
        lambda scan: (scan + b"\xff\xfe\0\x04ab") * rgb.MAX_SCANS,
        lambda scan: (scan + b"\xff\xd0junk\xff\xff") * rgb.MAX_SCANS,
        lambda scan: b"\xff\xfe\0\x02" * rgb.MAX_SEGMENTS + MANY,
    ],
    ids=["scans", "comments between", "restarts between", "segments"],
)
def test_more_scans_than_a_picture_needs_are_refused(more):
    data = coded(Image.fromarray(RGB), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    data = data[:-2] + more(data[last:-2]) + data[-2:] + FILM
    for read in (rgb.picture, fitted, lambda data: decode(data, 16)):
        with pytest.raises(BadSample, match="too many scans"):
            read(data)
    with pytest.raises(BadSample, match="more than 100 scans"):
        look(data)


def test_a_white_picture_is_suspicious():
    white = np.full((64, 48, 3), 255, np.uint8)
    assert rgb.suspicious(white)
    white[:3] = 0
    assert rgb.suspicious(white)  # 95.3 %
    white[3] = 254
    assert not rgb.suspicious(white)
    assert not rgb.suspicious(np.zeros((64, 48, 3), np.uint8))
    assert not rgb.suspicious(smooth())
