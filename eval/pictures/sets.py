"""Sets of pictures on disk, by any system: a folder, which may contain tars, or one tar.

A picture's id is its path in the set without the ending; hidden files (a leading dot) are ignored.
Ids are sorted, batches depend on the set and the batch size alone, and a set's hash covers all ids
and bytes. `notes` counts the pictures that need a conversion to 8-bit RGB; a picture that cannot be
read is an error that names it. `captions.py` reads the captions.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cascade.data.items import stated_orientation
from cascade.data.tars.index import LIMITS
from cascade.data.tars.keys import HOSTILE
from cascade.data.tars.tar import PACKED, contents
from cascade.errors import UserError
from cascade.eval.pictures.conversion import Look, look, pixels
from cascade.formats.folders import walked
from cascade.formats.rgb import ENDINGS, UNREAD, BadSample, is_picture

_WORKERS = min(16, os.cpu_count() or 1)  # decoding and hashing release the GIL


class Span(NamedTuple):
    """The location of some bytes: a file, or a member of a tar."""

    file: Path
    offset: int
    bytes: int

    def head(self) -> bytes:
        """The first 32 bytes. UserError as for `read`."""
        return self._replace(bytes=min(32, self.bytes)).read()

    def read(self) -> bytes:
        """The bytes. UserError if the file cannot be read or is too short."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.bytes)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from error
        if len(data) != self.bytes:
            raise UserError(f"{self.file} has changed while it was read: wait until it is complete")
        return data


class Listing(NamedTuple):
    """Pictures, and the text and JSON files next to them, by id."""

    pictures: dict[str, Span]
    texts: dict[str, Span]
    fields: dict[str, Span]


def listed(path: Path) -> Listing:
    """The files of a folder or a tar, by name; no picture is opened.

    Raises:
        UserError: the path does not exist, a tar is damaged, two pictures have one id, a name is
            unsafe, or a picture has an unsupported format.
    """
    found, names = Listing({}, {}, {}), {}
    beside = {"txt": found.texts, "json": found.fields}
    for name, span in _files(path):
        stem, _, ending = name.rpartition(".")
        ending = ending.lower()
        if HOSTILE.search(name):
            raise UserError(f"{path}: a file is called {name!r}: rename it")
        kind = found.pictures if ending in ENDINGS else beside.get(ending)
        if _hidden(name):
            continue
        if kind is None and is_picture(name, span.head):
            what = "of a format that is not read" if ending in UNREAD else "a picture by its bytes"
            raise UserError(f"{path}: {name} is {what}: save it as PNG, and call it so")
        place = ("picture" if ending in ENDINGS else ending, stem)
        if kind is not None and kind.setdefault(stem, span) is not span:
            raise UserError(
                f"{path}: {name} is not the only one called {stem}: rename {names[place]}"
            )
        names[place] = name
    return found


def _files(path: Path) -> Iterator[tuple[str, Span]]:
    """Names in a set, with their bytes; a tar within a folder is treated like a folder."""
    if path.is_file():
        yield from _members(path)
        return
    if not path.is_dir():
        raise UserError(f"{path} is not there: give a folder of pictures, or a tar of them")
    for file in walked(path):
        inside = file.relative_to(path).as_posix()
        if _hidden(inside):
            continue
        if file.suffix == ".tar":
            stem = inside.removesuffix(".tar")
            yield from ((f"{stem}/{member}", span) for member, span in _members(file))
        elif file.name.endswith(PACKED):
            raise UserError(f"{file} is compressed: unpack it, or move it out of {path}")
        elif file.is_file():
            yield inside, Span(file, 0, file.stat().st_size)
        elif file.is_symlink():
            raise UserError(f"{file} is a link to {file.readlink()}, which is missing: remove it")


def _hidden(name: str) -> bool:
    return "/." in f"/{name}"


def _members(tar: Path) -> Iterator[tuple[str, Span]]:
    """Names of the files in a tar, with their bytes. UserError if the tar is incomplete."""
    found = contents(tar)
    if not found.whole:
        raise UserError(f"{tar} is no complete tar: copy it again")
    for member in found.members:
        name = member.name.removeprefix("./")
        if member.lost and not _hidden(name):
            raise UserError(f"{tar}: {name} is a {member.lost}: pack the file itself")
        yield name, Span(tar, member.offset, member.bytes)


@dataclass(frozen=True, eq=False)
class PictureSet:
    """A set whose files have all been read once; each can be converted to 8-bit RGB.

    Attributes:
        path: of the folder, or of the tar.
        spans, texts: of pictures (sorted by id), and of the text files next to them.
        looks, digests: what the header of each picture tells, and the SHA-256 of its bytes.
        square: side in pixels to which the centred square of each picture is resized; None: they
            stay as they are.
        stated: the EXIF orientation of pictures, by id, where the JSON next to them states one.
    """

    path: Path
    spans: dict[str, Span]
    texts: dict[str, Span]
    looks: list[Look]
    digests: list[bytes]
    square: int | None = None
    stated: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def ids(self) -> list[str]:
        return list(self.spans)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits for all ids, bytes, and `square`."""
        digest = hashlib.sha256(f"{self.square}".encode())
        for name, of_bytes in zip(self.spans, self.digests):
            digest.update(name.encode(errors="surrogateescape") + b"\0" + of_bytes)
        return digest.hexdigest()[:16]

    @property
    def format(self) -> str:
        """ "PNG", or "JPEG and PNG"."""
        return " and ".join(sorted({look.format for look in self.looks}))

    @property
    def notes(self) -> dict[str, int]:
        """How many pictures need each conversion."""
        return dict(Counter(note for look in self.looks for note in look.notes))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each picture, as in batches."""
        return [(self.square, self.square) if self.square else look.size for look in self.looks]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all pictures. UserError if they differ."""
        sizes = self.sizes
        counts = Counter(sizes)
        if len(counts) > 1:
            (most, n), (other, _), *_ = counts.most_common()
            odd = self.ids[sizes.index(other)]
            raise UserError(
                f"{self.path} has pictures of {len(counts)} sizes ({n} of {most[1]}x{most[0]}, and "
                f"{odd} of {other[1]}x{other[0]}): make them one size, or ask for a --resize"
            )
        return next(iter(counts))

    def blocks(self, size: int) -> list[list[int]]:
        """The rows of each batch: at most `size` pictures of equal size, by id."""
        sizes = self.sizes
        rows = sorted(range(len(self)), key=lambda i: (sizes[i], i))
        alike = [list(group) for _, group in groupby(rows, key=sizes.__getitem__)]
        return [part[i : i + size] for part in alike for i in range(0, len(part), size)]

    def batches(self, blocks: Sequence[Sequence[int]]) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """The pictures of each block, while the next block is decoded; no others are in memory.

        Raises:
            UserError: a picture is broken.
        """
        spans = [(*item, self.square, self.stated.get(item[0])) for item in self.spans.items()]
        with ThreadPoolExecutor(_WORKERS) as pool:
            ahead: list[Future] = []
            for rows in [*blocks, []]:
                ready = ahead
                ahead = [pool.submit(_pixels, *spans[i]) for i in rows]
                if ready:
                    yield torch.from_numpy(np.stack([picture.result() for picture in ready]))


def picture_set(
    path: Path,
    only: Collection[str] | None = None,
    square: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PictureSet:
    """The pictures of a folder or a tar. Reads all files once, for the hash, without decoding.

    Args:
        only: ids to include; others are ignored.
        square: see `PictureSet`.
        progress: called with (pictures read, number of pictures).

    Raises:
        UserError: see `listed`; or a picture cannot be read, or there is none.
    """
    found = listed(path)
    names = sorted(found.pictures if only is None else found.pictures.keys() & set(only))
    if not names:
        raise UserError(f"{path} holds no picture: give a folder or a tar of PNG, JPEG or WebP")
    spans = {name: found.pictures[name] for name in names}
    stated = {n: turn for n in names if (turn := _stated(found.fields.get(n)))}
    looks, digests = [], []
    with ThreadPoolExecutor(_WORKERS) as pool:
        for found_out, digest in pool.map(_looked, names, spans.values(), map(stated.get, names)):
            looks.append(found_out)
            digests.append(digest)
            if progress:
                progress(len(looks), len(spans))
    return PictureSet(path, spans, found.texts, looks, digests, square, stated)


def _looked(name: str, span: Span, stated: int | None) -> tuple[Look, bytes]:
    data = _read(name, span)
    digest = hashlib.sha256(data)
    if stated:  # changes the picture, though not the bytes
        digest.update(f"{stated}".encode())
    with _named(name, span):
        return look(data, stated), digest.digest()


def _pixels(
    name: str, span: Span, square: int | None, stated: int | None
) -> UInt8[np.ndarray, "3 h w"]:
    with _named(name, span):
        return pixels(_read(name, span), square, stated)


def _stated(fields: Span | None) -> int | None:
    """The EXIF orientation, if not 1, that a JSON next to a picture states."""
    if not fields or fields.bytes > LIMITS["json"]:
        return None
    turn = stated_orientation(fields.read())
    return turn if turn != 1 else None


def _read(name: str, span: Span) -> bytes:
    if span.bytes > LIMITS["picture"]:
        raise UserError(f"{_where(name, span)} has {span.bytes:,} bytes: save it smaller")
    return span.read()


@contextmanager
def _named(name: str, span: Span) -> Iterator[None]:
    try:
        yield
    except BadSample as error:
        raise UserError(f"{_where(name, span)} {error}") from error


def _where(name: str, span: Span) -> str:
    return f"{span.file}: {name}" if span.file.suffix == ".tar" else str(span.file)
