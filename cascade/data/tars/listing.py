"""Lists captioned pictures to pack: from a table that names files, or a text next to each picture.

Unusable ones are left out and reported by reason and name. A caption is one line, stripped.
"""

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cascade.formats.folders import walked
from cascade.formats.parquet import Stored
from cascade.formats.rgb import is_picture
from cascade.formats.tables import Caption, as_one, captions_in
from cascade.formats.texts import BadText, decoded, lines

MAX_CAPTIONS = 50_000  # characters per picture: more could exceed the limit for its JSON


class Row(NamedTuple):
    """A picture to pack: its name in the list, its file, size in bytes, and captions by column."""

    name: str
    path: Path | Stored
    size: int
    captions: dict[str, Caption]


def captioned_by_files(folder: Path) -> Iterator[tuple[str, dict[str, Caption] | str]]:
    """Yield names and captions of all pictures under a folder: the lines of their `name.txt`.

    If that is not text, the reason takes the place of the captions.

    Raises:
        UserError: see `walked`.
    """
    for path in sorted(walked(folder)):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and is_picture(path.name, partial(_head, path)):
            try:
                caption = captions_in(lines(decoded(path.with_suffix(".txt").read_bytes())))
                found = {"caption": caption} if caption else {}
            except OSError:
                found = {}
            except BadText as error:
                found = f"caption is {error}"
            yield str(name), found


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError:
        return b""


def usable(
    folder: Path,
    named: Iterable[tuple[str | Stored, dict[str, Caption] | str]],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Row], dict[str, list[str]]]:
    """Return the existing pictures with a caption, without duplicates, and the others by reason.

    Of pictures with the same content, or rows with the same file, the first counts. Only files of
    equal size are read.

    Args:
        named: names, with captions by column, or with the reason that there are none.
        progress: called with (pictures compared, pictures in all).
    """
    rows, refused, seen = [], defaultdict(list), set()
    root = os.path.normpath(folder)
    for given, captions in named:
        held = isinstance(given, Stored)
        name = given.name if held else given
        path = given if held else Path(os.path.normpath(os.path.join(root, given)))
        size = path.size if held else _size(path)
        if not held and not path.is_relative_to(root):
            refused["outside of the folder"].append(name)
        elif size is None:
            refused["missing file"].append(name)
        elif isinstance(captions, str) or not captions:
            refused[captions or "no caption"].append(name)
        elif sum(len(as_one(text)) for text in captions.values()) > MAX_CAPTIONS:
            refused["huge caption"].append(name)
        elif path in seen:
            refused["duplicate"].append(name)
        else:
            seen.add(path)
            rows.append(Row(name, path, size, captions))
    once, contents, sizes = [], set(), Counter(row.size for row in rows)
    for done, row in enumerate(rows, 1):
        content = _content(row.path) if row.size and sizes[row.size] > 1 else None
        if content is None or content not in contents:
            once.append(row)
        else:
            refused["duplicate"].append(row.name)
        contents.add(content)
        progress(done, len(rows))
    return once, dict(refused)


def _size(path: Path) -> int | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _content(path: Path | Stored) -> bytes | None:
    if isinstance(path, Stored):
        return path.digest
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None  # packing will report it as unreadable
