"""Claims about decoding: true to the full decode, one filter everywhere, nothing bad let in."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cascade.data.transforms import BadSample, Pictures, decode, shrink
from cascade.errors import UserError


def natural(h, w, seed=0):
    """A picture with a 1/f spectrum, as photographs have, and one sharp edge."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((3, h, w))) / np.maximum(f, 1 / max(h, w))
    field = np.fft.irfft2(spectrum, (h, w)).transpose(1, 2, 0)
    field = 128 + 50 * field / field.std()
    field[h // 3 : h // 2, w // 3 : w // 2] = (250, 40, 10)
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def coded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 0.25))


def test_scaled_decoding_is_true_to_the_full_decode_at_awkward_sizes():
    for h, w in ((512, 512), (500, 333), (381, 767), (257, 1031)):
        data = coded(natural(h, w, seed=h), quality=90)
        scaled, full = decode(data, 32), decode(data, 32, scaled=False)
        assert not np.array_equal(scaled, full)  # the shorter way was taken
        assert psnr(scaled, full) > 40, (h, w)


def test_a_jpeg_smaller_than_twice_the_target_is_decoded_in_full():
    data = coded(natural(100, 140), quality=90)
    assert np.array_equal(decode(data, 64), decode(data, 64, scaled=False))


def test_the_centre_is_kept():
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    assert (decode(coded(image, "PNG"), 32) == (0, 0, 255)).all()


def test_a_square_of_the_size_asked_for_is_taken_as_it_is():
    """As the filter, which is left out, would leave it."""
    image = natural(32, 50)
    square = np.array(image)[:, 9:41]
    found = decode(coded(image, "PNG"), 32)
    assert np.array_equal(found, square)
    x = torch.from_numpy(square.copy()).permute(2, 0, 1)[None]
    filtered = F.interpolate(x, (32, 32), mode="bicubic", antialias=True)
    assert torch.equal(filtered[0].permute(1, 2, 0), torch.from_numpy(found.copy()))


def test_the_orientation_of_the_camera_is_applied():
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    turned = decode(coded(image, quality=95, exif=exif), 16)
    assert turned[:, 9:].min() > 240
    assert turned[:, :7].max() < 15


def test_every_colour_mode_becomes_rgb_and_transparency_is_white():
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    clear = Image.new("RGBA", (32, 32), (200, 30, 30, 0))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 127))
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([9, 8, 7, 200, 30, 30])
    grey16 = Image.fromarray(np.full((32, 32), 0x80FF, np.uint16))
    for data, colour in (
        (coded(red, quality=95), (200, 30, 30)),
        (coded(red.convert("CMYK"), quality=95), (200, 30, 30)),
        (coded(red, "WEBP", lossless=True), (200, 30, 30)),
        (coded(Image.new("L", (32, 32), 77)), (77, 77, 77)),
        (coded(Image.new("LA", (32, 32), (77, 0)), "PNG"), (255, 255, 255)),
        (coded(clear, "PNG"), (255, 255, 255)),
        (coded(half, "PNG"), (128, 128, 128)),
        (coded(palette, "PNG"), (9, 8, 7)),
        (coded(palette, "PNG", transparency=0), (255, 255, 255)),
        (coded(grey16, "PNG"), (128, 128, 128)),
    ):
        picture = decode(data, 16)
        assert picture.shape == (16, 16, 3)
        assert picture.dtype == np.uint8
        assert np.abs(picture.astype(int) - colour).max() <= 3, (colour, picture[0, 0])


def png_header(w, h):
    body = b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\1IDAT"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "broken picture"),
        (b"<html>404 not found</html>", "broken picture"),
        (coded(natural(64, 64))[:-500], "broken picture"),
        (coded(natural(64, 64), "PNG")[:-500], "broken picture"),
        (coded(natural(64, 64), "GIF"), "broken picture"),
        (png_header(10_000, 10_000), "huge picture"),
        (png_header(60_000, 60_000), "huge picture"),
        (coded(Image.new("RGB", (1, 1)), "PNG"), "picture too small"),
        (coded(Image.new("RGB", (900, 7)), "PNG"), "picture too small"),
    ],
)
def test_a_bad_picture_is_refused_with_its_reason(data, reason):
    with pytest.raises(BadSample, match=f"^{reason}$"):
        decode(data, 32)


def test_shrink_is_the_filter_of_decode():
    image = natural(256, 256)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    small = (shrink(x, 64).permute(1, 2, 0) + 1) * 127.5
    difference = np.abs(small.numpy() - decode(coded(image, "PNG"), 64))
    assert difference.max() <= 2  # Pillow rounds after each of its two passes
    assert difference.mean() < 0.5


def test_shrink_stays_in_range_and_takes_any_batch():
    x = torch.randint(2, (2, 3, 3, 32, 32)).float().repeat_interleave(2, -1) * 2 - 1
    small = shrink(x.repeat_interleave(2, -2), 16)
    assert small.shape == (2, 3, 3, 16, 16)
    assert small.abs().max() <= 1
    assert torch.equal(small[1, 2], shrink(x.repeat_interleave(2, -2)[1, 2], 16))


def test_crops_are_aligned_with_those_of_the_whole_small_pictures():
    data, ratio = coded(natural(64, 64), "PNG"), 4
    whole = Pictures((64, 16))(data, np.random.default_rng(0))
    assert torch.equal(whole["image_16"], shrink(whole["image_64"], 16))
    corners = set()
    for seed in range(200):
        views = Pictures((16, 64), crop=32)(data, np.random.default_rng(seed))
        large, small = views["image_64"], views["image_16"]
        assert (large.shape, small.shape) == ((3, 32, 32), (3, 8, 8))
        places = [
            (i, j)
            for i in range(9)
            for j in range(9)
            if torch.equal(whole["image_16"][:, i : i + 8, j : j + 8], small)
        ]
        ((i, j),) = places
        top, left = ratio * i, ratio * j
        assert torch.equal(whole["image_64"][:, top : top + 32, left : left + 32], large)
        corners.add((i, j))
    assert {i for i, _ in corners} == {j for _, j in corners} == set(range(9))


def test_sizes_and_crops_that_do_not_line_up_are_refused():
    with pytest.raises(UserError, match="divide 64"):
        Pictures((64, 24))
    for crop in (30, 128):
        with pytest.raises(UserError, match="multiple of 4 up to 64"):
            Pictures((64, 16), crop=crop)
    assert Pictures(())(b"never read", np.random.default_rng(0)) == {}
