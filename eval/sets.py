"""Sets of pictures on disk, by whatever system: a folder, with tars in it or not, or one tar.

A picture's id is its path in the set without the ending; what is hidden (a leading dot) is none.
Ids are sorted, batches are a function of the set and the batch size, and a set's hash is one of
all ids and bytes. What becomes 8-bit RGB by a conversion is counted in `notes`; a picture that
cannot be read is refused by name. Captions lie beside the pictures (`eval.captions`).
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

from cascade.data.folders import walked
from cascade.data.index import LIMITS
from cascade.data.items import stated_orientation
from cascade.data.keys import HOSTILE
from cascade.data.rgb import ENDINGS, UNREAD, BadSample, is_picture
from cascade.data.tar import PACKED, contents
from cascade.errors import UserError
from cascade.eval.rgb import Look, look, pixels

_WORKERS = min(16, os.cpu_count() or 1)  # Pillow decodes, and a hash is taken, without the GIL


class Span(NamedTuple):
    """Where some bytes lie: a file, or a member of a tar."""

    file: Path
    offset: int
    bytes: int

    def head(self) -> bytes:
        """The first 32 of them. Raises UserError as `read` does."""
        return self._replace(bytes=min(32, self.bytes)).read()

    def read(self) -> bytes:
        """Raises UserError if they are gone, or not all there."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.bytes)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from error
        if len(data) != self.bytes:
            raise UserError(f"{self.file} has changed while it was read: wait until it is whole")
        return data


class Listing(NamedTuple):
    """Pictures, and the texts and JSONs beside them, by id."""

    pictures: dict[str, Span]
    texts: dict[str, Span]
    fields: dict[str, Span]


def listed(path: Path) -> Listing:
    """What a folder or a tar holds, by name; no picture is opened.

    Raises:
        UserError: there is neither, a tar is damaged, two pictures have one id, or a name leads
            elsewhere or is of a kind of picture that is not read.
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
    """Names in a set, and where their bytes are; a tar within a folder is like a folder."""
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
            raise UserError(f"{file} is a link to {file.readlink()}, which is not there: remove it")


def _hidden(name: str) -> bool:
    return "/." in f"/{name}"


def _members(tar: Path) -> Iterator[tuple[str, Span]]:
    """Names of the files in a tar, and where their bytes are. UserError if it is not whole."""
    found = contents(tar)
    if not found.whole:
        raise UserError(f"{tar} is no whole tar: copy it again")
    for member in found.members:
        name = member.name.removeprefix("./")
        if member.lost and not _hidden(name):
            raise UserError(f"{tar}: {name} is a {member.lost}: pack the file that is meant")
        yield name, Span(tar, member.offset, member.bytes)


@dataclass(frozen=True, eq=False)
class PictureSet:
    """A set that was looked through: all files are there and can be meant as 8-bit RGB.

    Attributes:
        path: of the folder, or of the tar.
        spans, texts: of pictures (sorted by id), and of the texts that lie beside them.
        looks, digests: what one pass over the bytes said of each picture, and their SHA-256.
        square: side that the centred square of each picture is resized to; None: as it is.
        stated: how a picture has to be turned, by id, where the JSON beside it says so.
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
        """Sixteen hexadecimal digits of all ids, bytes, and `square`."""
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
        """How many pictures are converted, by how."""
        return dict(Counter(note for look in self.looks for note in look.notes))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each picture, in pixels, as batches hold it."""
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
        """Rows of each batch: at most `size` pictures, all as large as each other, by id."""
        sizes = self.sizes
        rows = sorted(range(len(self)), key=lambda i: (sizes[i], i))
        alike = [list(group) for _, group in groupby(rows, key=sizes.__getitem__)]
        return [part[i : i + size] for part in alike for i in range(0, len(part), size)]

    def batches(self, blocks: Sequence[Sequence[int]]) -> Iterator[UInt8[Tensor, "b 3 h w"]]:
        """The pictures of each block; the next block is decoded meanwhile, and no more are held.

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
    """The pictures of a folder or a tar; all are read once, for the hash, and none is decoded.

    Args:
        only: the ids that count; others are passed over.
        square: see `PictureSet`.
        progress: called with (pictures read, pictures in all).

    Raises:
        UserError: see `listed` and `eval.rgb`; or there is no picture.
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
    if stated:  # of the same bytes, it makes another picture
        digest.update(f"{stated}".encode())
    with _named(name, span):
        return look(data, stated), digest.digest()


def _pixels(
    name: str, span: Span, square: int | None, stated: int | None
) -> UInt8[np.ndarray, "3 h w"]:
    with _named(name, span):
        return pixels(_read(name, span), square, stated)


def _stated(fields: Span | None) -> int | None:
    """EXIF's number, above 1, that a JSON beside a picture gives (see `items.picture_of`)."""
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
