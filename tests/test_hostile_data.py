"""Pictures and shards are strangers' work: what is hostile in them costs its sample, and no more.

Nothing runs, nothing is written elsewhere, no more memory is taken than a sample may have.
"""

import io
import os
import pickle
import re
import resource
import struct
import sys
import tarfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from cascade.config.compose import built, composed
from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars import tar as tars
from cascade.data.tars.index import scan
from cascade.data.tars.open_tar import OpenTar
from cascade.data.tars.pack import fitted
from cascade.data.tars.urls import groups
from cascade.data.transforms import BadSample, Pictures, decode
from cascade.eval.pictures.conversion import pixels
from cascade.formats.rgb import MAX_SCANS
from tests.hostile import Evil, refused

# Pictures


def coded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(w, h, *chunks, pixels=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    body = [*chunks, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(body)


def jpeg_of_size(w, h):
    data = bytearray(coded(PICTURE))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", h, w)
    return bytes(data)


def webp_of_size(w, h):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = bytearray(coded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    at = data.find(b"VP8X") + 12
    data[at : at + 6] = (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    return bytes(data)


def scans(n):
    """A progressive JPEG whose last scan is there n times more."""
    data = coded(PICTURE, progressive=True)
    end, last = data.rfind(b"\xff\xd9"), data.rfind(b"\xff\xda")
    return data[:end] + data[last:end] * n + data[end:]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
BLACK = bytes(64 * (3 * 64 + 1))
BOMB = zlib.compress(bytes(100_000_000), 1)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(canary) (w) file\n"
BAD_PICTURES = {
    "PNG of 100,000 px": (png(100_000, 100_000), "huge picture"),
    "PNG of 2^31 px": (png(2**31 - 1, 2**31 - 1), "huge picture"),
    "JPEG of 65,500 px": (jpeg_of_size(65_500, 65_500), "huge picture"),
    "JPEG of 8,000 px": (jpeg_of_size(8_000, 8_000), "huge picture"),
    "WebP of 16,384 px": (webp_of_size(16_384, 16_384), "huge picture|broken picture"),
    "PNG of no width": (png(0, 64), "broken picture"),
    "JPEG of no size": (jpeg_of_size(0, 0), "broken picture"),
    "PNG of negative size": (png(2**32 - 1, 64, pixels=BLACK), "broken picture|huge picture"),
    "text that grows": (png(64, 64, chunk(b"zTXt", b"a\0\0" + BOMB), pixels=BLACK), "broken"),
    "profile that grows": (png(64, 64, chunk(b"iCCP", b"a\0\0" + BOMB), pixels=BLACK), "broken"),
    "JPEG of endless scans": (scans(MAX_SCANS), "too many scans"),
    "PNG that is cut short": (coded(PICTURE, "PNG")[:-500], "broken picture"),
    "JPEG that is cut short": (coded(PICTURE)[:-500], "broken picture"),
    "WebP that is cut short": (coded(PICTURE, "WEBP")[:-500], "broken picture"),
    "EPS": (coded(PICTURE, "EPS"), "broken picture"),
    "EPS by hand": (POSTSCRIPT, "broken picture"),
    "a pickle": (pickle.dumps(Evil("canary")), "broken picture"),
    "HTML": (b"<html><script>alert(1)</script></html>", "broken picture"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>", "broken"),
    "nothing": (b"", "broken picture"),
} | {
    form: (coded(PICTURE, form), "broken picture")
    for form in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PCX", "TGA", "SGI", "PDF", "JPEG2000", "DDS")
}


@contextmanager
def memory_limited(mebibytes):
    """Whoever asks for so much more memory than there is now gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_hostile_picture_is_refused_with_a_reason(name, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program ran"))
    data, reason = BAD_PICTURES[name]
    with pytest.raises(BadSample, match=reason), memory_limited(64):
        decode(data, 32)


def patched(form, at, *fields, kind="<H"):
    data = bytearray(coded(PICTURE, form))
    for place, value in zip(at, fields):
        struct.pack_into(kind, data, place, value)
    return bytes(data)


CONVERTED = {
    "BMP": (patched("BMP", (18, 22), 8000, 8000, kind="<i"), "huge picture"),
    "GIF": (patched("GIF", (6, 8), 65_000, 65_000), "huge picture"),
    "PPM": (b"P6 8000 8000 255\n" + bytes(100), "huge picture"),
    "TIFF": (coded(Image.new("1", (8000, 8000)), "TIFF", compression="group4"), "huge picture"),
    "short TIFF": (coded(PICTURE, "TIFF")[:-500], "broken picture"),
    "float TIFF": (coded(Image.new("F", (9, 9)), "TIFF"), "values without a white"),
    "32-bit TIFF": (coded(Image.new("I", (9, 9)), "TIFF"), "values without a white"),
    "EPS": (POSTSCRIPT, "broken picture"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_hostile_picture_that_would_be_converted_is_refused_with_a_reason(name, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program ran"))
    data, reason = CONVERTED[name]
    with pytest.raises(BadSample, match=reason), memory_limited(64):
        fitted(data)
    with pytest.raises(BadSample), memory_limited(64):
        pixels(data)


def many_frames(form):
    n = MAX_SCANS if form == "MPO" else 300  # each frame of an MPO is a JPEG
    frames = [Image.new("RGB", (64, 64), (k % 255, 0, 0)) for k in range(n)]
    return coded(frames[0], form, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "data",
    [
        coded(PICTURE, quality=95) + b"PK\3\4" + pickle.dumps(Evil("canary")),
        coded(PICTURE, quality=95, icc_profile=b"junk" * 30_000),
        coded(PICTURE, quality=95, comment=b"<?php system('touch canary') ?>"),
        coded(PICTURE, quality=95, exif=b"Exif\0\0junk"),
        scans(50),
        png(64, 64, pixels=BLACK + bytes(50_000_000)),
        *map(many_frames, ("PNG", "WEBP", "MPO")),
    ],
    ids=["appended", "profile", "comment", "EXIF", "scans", "more pixels", "APNG", "WebP", "MPO"],
)
def test_what_else_is_in_a_picture_is_ignored(data):
    with memory_limited(64):
        assert decode(data, 32).shape == (32, 32, 3)
        assert fitted(data, 16).size == (16, 16)


# Shards


def header(name, size=0, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name, data):
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def sample(key, picture=None):
    return member(f"{key}.jpg", picture or coded(PICTURE)) + member(f"{key}.txt", b"a caption")


def sized(name, size):
    """A header of a size that tarfile would not write."""
    data = bytearray(header(name))
    data[124:136] = (
        size.to_bytes(12, "big", signed=True)
        if size < 0
        else bytes([128, *size.to_bytes(11, "big")])
    )
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def pax(**fields):
    """An extended header."""
    lines = b""
    for key, value in fields.items():
        line = f" {key.replace('__', '.')}={value}\n"
        length = len(line) + len(str(len(line) + len(str(len(line)))))
        lines += f"{length}{line}".encode()
    return header("pax", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % 512)


def written(path, *parts):
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def keys(index):
    return [index.key(row) for row in range(len(index.ends))]


LONG = 2**20 + 1
NAMES = ["../../canary", "/tmp/canary", "a/../../canary", "a\nb", "a\x1b[2Jb", "a\tb", "../canary"]
SPARSE = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__name": "b.jpg"}
DAMAGED = {
    "a size below zero": sized("b.jpg", -512),
    "a size that leads back to its header": sized("b.jpg", -1536),
    "an endless member": sized("b.jpg", 2**62),
    "an endless member, extended": pax(size=str(10**18)) + member("b.jpg", b"x"),
    "a size below zero, extended": pax(size="-1024") + member("b.jpg", b"x"),
    "a sparse member": pax(**SPARSE, GNU__sparse__realsize=str(10**15)) + member("b.jpg", b"5\n"),
    "a huge header": sized("pax", 2**40)[:156] + tarfile.XHDTYPE + sized("pax", 2**40)[157:],
    "a huge name": header("././@LongLink", LONG, b"L") + b"x" * LONG + bytes(-LONG % 512),
    "a huge comment": pax(comment="x" * LONG) + member("b.jpg", b"x"),
    "a loop of headers": header("pax", 6, tarfile.XHDTYPE) + b"0 a=b\n".ljust(512, b"\0"),
    "headers of headers": pax(a="b") * 3000 + member("b.jpg", b"x"),
    "names of names": (header("././@LongLink", 2, b"L") + b"a\0".ljust(512, b"\0")) * 3000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tar_ends_there_and_says_so(name, tmp_path):
    """Nothing goes round for ever, nothing asks for more memory than the tar takes."""
    tar = written(tmp_path / "0.tar", sample("a"), sample("b"), DAMAGED[name], sample("c"))
    with memory_limited(64):
        index = scan(tar)
    assert set(keys(index)) <= {"a", "b"}
    assert "a" in keys(index)
    assert index.left_out["cut short"] == 1


def test_what_is_in_a_tar_stays_there(tmp_path, canary):
    """Members that are no files or lead elsewhere, and what only unpickling would read."""
    evil = io.BytesIO()
    np.save(evil, np.array([Evil(canary)], dtype=object))
    parts = [sample(name) for name in NAMES]
    for extension in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "cls", "index", "tar"):
        data = evil.getvalue() if extension == "npy" else pickle.dumps(Evil(canary))
        parts.append(member(f"good.{extension}", data))
    parts.append(sample("good"))
    parts.append(
        pax(**SPARSE, GNU__sparse__realsize="1") + member("b.jpg", b"1\n0\n1\n" + bytes(506))
    )
    parts.append(member("b.txt", b"a caption"))
    for n, kind in enumerate((b"1", b"2", b"3", b"4", b"5", b"6")):  # links, devices, ...
        parts.append(header(f"link{n}.jpg", kind=kind, linkname="/etc/passwd"))
        parts.append(member(f"link{n}.txt", b"a caption"))
    tar = written(tmp_path / "shards.tar", *parts)
    index = scan(tar)
    assert keys(index) == ["good"]
    lost = {tars.LINK: 2, tars.SPARSE: 1}
    assert index.left_out == {"hostile name": len(NAMES), "no picture": 4, **lost}
    shards = Shards([tar], Pictures([16]), max_skip_fraction=1.0)
    assert shards.skipped == index.left_out
    item = shards[0]
    assert item["caption"] == "a caption"
    assert item["image_16"].shape == (3, 16, 16)
    assert item.keys() == {"sample", "key", "caption", "image_16", "skipped"}
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"modules", "shards.tar"}


def test_a_bad_member_costs_its_sample_and_is_counted(tmp_path):
    """Of every kind of hostile picture one, of texts those that are too long."""
    pictures = {name: data for name, (data, _) in BAD_PICTURES.items() if data}
    parts = [sample(f"picture{n}", data) for n, data in enumerate(pictures.values())]
    parts.append(member("long.jpg", coded(PICTURE)) + member("long.txt", b"x" * LONG))
    parts.append(member("deep.jpg", coded(PICTURE)) + member("deep.json", b"[" * 100_000))
    digits = member("digits.json", b'{"a": ' + b"1" * 10_000 + b"}")
    parts.append(member("digits.jpg", coded(PICTURE)) + digits)
    parts.append(sample("good"))
    captions = {"txt": 1.0, "a": 1.0}
    tar = written(tmp_path / "shards.tar", *parts)
    item = Shards([tar], Pictures([32]), captions=captions, shuffle=False)[0]
    assert item["key"] == "shards/good"
    skipped = [skip.reason for skip in item["skipped"]]
    for name, reason in zip(pictures, skipped):
        assert re.search(BAD_PICTURES[name][1], reason), name
    assert skipped[len(pictures) :] == ["huge file", "broken JSON", "broken JSON"]


def test_a_member_over_the_limit_is_never_read(tmp_path, monkeypatch):
    """Nor if an index that came with the tar says so."""
    tar = written(tmp_path / "a.tar", sample("a"), sample("b"))
    index = scan(tar)
    spans = index.spans.copy()
    spans[0, 0] = 0, 2**40
    spans[1, 0] = 0, -1
    forged = replace(index, spans=spans)
    opened = OpenTar(forged, {"txt"})
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    for place in (0, 1):
        with pytest.raises(BadSample, match="huge file"):
            opened.read(place, "picture")


def test_a_command_in_a_url_runs_only_where_it_is_allowed(canary, monkeypatch):
    pictures = Pictures([32])
    for url in (f"pipe:touch {canary}", f"PIPE:touch {canary}", f"pipe:{{a,b}}; touch {canary}"):
        refused(lambda url=url: Stream(url, pictures, allow_pipe=False), "data.allow_pipe=true")
    refused(lambda: Stream("s3://bucket/0.tar", pictures, allow_pipe=False), "s3://bucket/0.tar")

    def started(*_, shell=False, **__):
        assert not shell
        raise OSError("no program is started here")

    monkeypatch.setattr(sys.modules["webdataset.gopen"], "Popen", started)
    for url in (f"http://host/'; touch {canary}; '0.tar", f"gs://$(touch {canary})/0.tar"):
        (opened,) = Stream(url, pictures, allow_pipe=False).urls.values()
        with pytest.raises(OSError, match="no program"):
            next(groups(opened))
    config = composed("train", ["stage=decoder_text", "data=stream", "data.urls=pipe:true"])
    assert not config.data.allow_pipe
    refused(lambda: built(config.data), "runs a command")
