"""Packs pictures and captions into WebDataset tars in img2dataset's layout.

All pictures are shuffled once and numbered in that order, the first ones being held out; a
picture's key is its number, and unusable ones leave gaps. So a shard depends on the list and its
own position only, and a repeated call writes just the missing shards.
"""

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from PIL import Image

from cascade.data.tars.index import LIMITS
from cascade.data.tars.listing import Row
from cascade.data.tars.splits import share_or_count
from cascade.data.tars.tar import tars_of
from cascade.draws import generator
from cascade.errors import UserError
from cascade.files.stores import places
from cascade.files.stores.places import Place
from cascade.formats import rgb
from cascade.formats.rgb import BadSample

MANIFEST = "pack.json"

# The members of a sample that are not captions.
OWN_FIELDS = ("key", "file", "width", "height", "original_width", "original_height")

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_QUALITY = 95
_AHEAD = 64  # pictures in memory at a time


class Fitted(NamedTuple):
    """A picture as stored in a shard."""

    extension: str
    data: bytes
    size: tuple[int, int]
    original: tuple[int, int]


def fitted(data: bytes, short: int | None = None) -> Fitted:
    """Return a JPEG, PNG or WebP file unchanged if it decodes, resized if its short side is longer.

    Other formats become a PNG of the same pixels.

    Args:
        short: the greatest short side in pixels; None: any.

    Raises:
        BadSample: as from `rgb.picture`, or a file of another format holds several pictures, which
            a PNG cannot.
    """
    image = rgb.opened(data, rgb.CONVERTIBLE)
    kind, size = rgb.format_of(image), image.size
    if kind not in _EXTENSIONS and rgb.several(image):
        raise BadSample("several pictures")
    picture = Image.fromarray(rgb.picture(data, rgb.CONVERTIBLE))
    larger = short is not None and min(size) > short
    if kind in _EXTENSIONS and not larger:
        return Fitted(_EXTENSIONS[kind], data, size, size)
    if larger:
        ratio = short / min(size)
        sides = [round(ratio * n) for n in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    kind, file = kind if kind in _EXTENSIONS else "PNG", io.BytesIO()
    # A colour profile for grey or CMYK does not apply to RGB.
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    picture.save(file, kind, quality=_QUALITY, **({"icc_profile": profile} if profile else {}))
    return Fitted(_EXTENSIONS[kind], file.getvalue(), picture.size, size)


def held_out(val: str, pictures: int) -> int:
    """Return how many pictures "100", or a share such as "0.01" or "1%", holds out.

    Raises:
        UserError: neither a number nor a share, or all pictures.
    """
    try:
        value = share_or_count(val)
        count = value if isinstance(value, int) else math.ceil(value * pictures)
    except ValueError:
        count = -1
    if not 0 <= count < pictures:
        raise UserError(f"--val {val}: give a number below {pictures} or a share such as 1%")
    return count


def pack(
    rows: Sequence[Row],
    out: Place,
    val: int,
    short: int | None,
    per_shard: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[str]]:
    """Write `val-*.tar` with `val` pictures and `train-*.tar` with the others.

    A sample is a picture, `.txt` (its first caption) and `.json` (all captions, a list for columns
    with several; the file's name, sizes). Shards are written atomically, after their `_stats.json`;
    existing ones are kept.

    Args:
        short: shrink larger pictures to this short side.
        per_shard: how many pictures, unusable ones included.
        progress: called with the number of pictures done.

    Returns:
        The names of the unusable pictures, by reason.

    Raises:
        UserError: `out` holds other shards, or shards of another list.
    """
    if taken := {name for row in rows for name in row.captions} & set(OWN_FIELDS):
        raise UserError(f"a caption column is called {taken.pop()}, a reserved name: rename it")
    choices = {"val": val, "size": short, "per_shard": per_shard, "seed": seed}
    _check_manifest(out, {"pictures": len(rows), **choices, "list": _digest(rows)})
    order = generator(seed, "pack", 0).permutation(len(rows)).tolist()
    refused = defaultdict(list)
    for split, span in (("val", range(val)), ("train", range(val, len(rows)))):
        for shard, start in enumerate(range(span.start, span.stop, per_shard)):
            numbers = range(start, min(start + per_shard, span.stop))
            path = out / f"{split}-{shard:05d}.tar"
            stats = path.with_name(f"{path.stem}_stats.json")
            if not places.exists(path):
                some = {n: rows[order[n]] for n in numbers}
                places.write(path, partial(_write, some, short, stats, progress))
            if places.exists(stats):
                for reason, names in json.loads(places.read_bytes(stats))["refused"].items():
                    refused[reason] += names
            progress(numbers.stop)
    return dict(refused)


def _check_manifest(out: Place, about: dict[str, Any]) -> None:
    """Write the options to `pack.json`, or raise UserError if the folder was packed with others."""
    path = out / MANIFEST
    if not places.exists(path):
        if tars_of(out):
            raise UserError(f"{out} holds other shards: choose another folder")
        places.write_text(path, json.dumps(about) + "\n")
        return
    try:
        before = json.loads(places.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: choose another folder") from error
    if changed := [name for name in about if before.get(name) != about[name]]:
        remedy = "choose another folder"
        if "list" in changed:
            remedy += ", or give the --caption-columns that it was made with"
        raise UserError(f"{out} holds shards of another {' and another '.join(changed)}: {remedy}")


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.name, row.size, list(row.captions.items())]).encode())
    return digest.hexdigest()


def _write(
    rows: dict[int, Row],
    short: int | None,
    stats: Place,
    progress: Callable[[int], None],
    path: Path,
) -> None:
    """Write a shard of rows by number, and its statistics."""
    refused, numbers = defaultdict(list), list(rows)
    with (
        path.open("wb") as file,  # not by name: webdataset would take some paths for URLs
        webdataset.TarWriter(file, mtime=0) as writer,
        ThreadPoolExecutor() as pool,
    ):
        for start in range(0, len(numbers), _AHEAD):
            some = numbers[start : start + _AHEAD]
            pictures = pool.map(partial(made, short=short), map(rows.get, some))
            for number, picture in zip(some, pictures):
                if isinstance(picture, str):
                    refused[picture].append(rows[number].name)
                else:
                    writer.write(_sample(number, rows[number], picture))
                progress(number + 1)
    counts = {"pictures": len(rows) - sum(map(len, refused.values())), "refused": refused}
    places.write_text(stats, json.dumps(counts) + "\n")


def made(row: Row, short: int | None = None) -> Fitted | str:
    """Return the picture of a row, or the reason that it is unusable."""
    if row.size > LIMITS["picture"]:
        return "huge picture"
    if rgb.ending(row.name) in rgb.UNREAD:  # the TIFF in a camera's raw file is only a preview
        return rgb.FOREIGN
    try:
        return fitted(row.path.read_bytes(), short)
    except BadSample as reason:
        return str(reason)
    except OSError:
        return "missing file"


def _sample(number: int, row: Row, picture: Fitted) -> dict[str, str | bytes]:
    key, first = f"{number:09d}", next(iter(row.captions.values()))
    caption = first if isinstance(first, str) else first[0]
    own = (key, row.name, *picture.size, *picture.original)
    fields = {"caption": caption, **row.captions, **dict(zip(OWN_FIELDS, own))}
    members = {picture.extension: picture.data, "txt": caption, "json": json.dumps(fields).encode()}
    return {"__key__": key, **members}
