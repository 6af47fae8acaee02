"""Pictures with captions as people have them: a table that names files, or a text beside each.

What cannot be used is left out by reason and by name. A caption is one line, stripped.
"""

import csv
import hashlib
import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cascade.data import parquet
from cascade.data.folders import walked
from cascade.data.parquet import Stored
from cascade.data.rgb import is_picture
from cascade.errors import UserError

FILE_COLUMNS = (
    *("file_name", "filename", "file", "file_path", "filepath"),
    *("image", "image_file", "image_path", "picture", "path", "name"),
)
MAX_CAPTIONS = 50_000  # characters of a picture's captions together, so that its JSON can be read
CAPTION_COLUMN = re.compile(r"(\w+_)?(caption|text|txt|prompt|description)s?(_?\d+)?|alt|title")


class Row(NamedTuple):
    """A picture to pack: its name in the list, its file, bytes, and captions by column."""

    name: str
    path: Path | Stored
    size: int
    captions: dict[str, str]


def table(path: Path, spill: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSONL or parquet file, or of all parquet files of a folder.

    Args:
        spill: where pictures that lie in parquet are copied to (see `parquet.rows`).

    Raises:
        UserError: another kind of file, one that cannot be read or is damaged, or parquet where
            pyarrow is not installed.
    """
    readers = {
        ".csv": partial(_separated, delimiter=","),
        ".tsv": partial(_separated, delimiter="\t"),
        ".jsonl": _json_lines,
        ".parquet": partial(parquet.rows, spill=spill),
    }
    if parts := sorted(path.glob("*.parquet")) if path.is_dir() else []:
        return [row for part in parts for row in table(part, spill)]
    read = readers.get(path.suffix.lower())
    if not read:
        raise UserError(f"{path}: give a table of captions that ends in {', '.join(readers)}")
    try:
        rows = list(read(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not rows:
        raise UserError(f"{path} has no rows: give a table with a header and a row per picture")
    return rows


def _separated(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(lines, [])
        for fields in filter(None, lines):
            if len(fields) != len(header):  # a caption with a bare comma would lose its rest
                raise ValueError(
                    f"line {lines.line_num} has {len(fields)} fields, the header {len(header)}; "
                    "put quotes around what holds a separator"
                )
            yield dict(zip(header, fields))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def columns(
    rows: Sequence[Mapping[str, Any]], file: str | None = None, captions: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Which column names the file, and which hold captions: as given, or by common names.

    Raises:
        UserError: there is no such column.
    """
    there = list(dict.fromkeys(name for row in rows for name in row))
    known = {name.lower(): name for name in there}
    common = [known[name] for name in FILE_COLUMNS if name in known]
    file = file or next(iter(_of_pictures(rows, there) or common), None)
    captions = list(captions) or [
        name for name in there if name != file and CAPTION_COLUMN.fullmatch(name.lower())
    ]
    wrong = [name for name in (file, *captions) if name and name not in there]
    if wrong or not file or not captions:
        what = wrong[0] if wrong else "a caption" if file else "a file"
        raise UserError(
            f"no column for {what} among {', '.join(there)}: name them with --file-column and "
            "--caption-columns"
        )
    return file, captions


def _of_pictures(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The column that holds pictures themselves, if there is one. UserError if there are more."""
    held = [name for name in names if any(isinstance(row.get(name), Stored) for row in rows)]
    if len(held) > 1:
        raise UserError(f"there are pictures in {', '.join(held)}: name one with --file-column")
    return held


def rows_of_table(
    rows: Iterable[Mapping[str, Any]], file: str, captions: Sequence[str]
) -> Iterator[tuple[str | Stored, dict[str, str]]]:
    """File name and captions by column of each row; captions that are empty are left out.

    Instead of a name there is the picture, where it lies in the table.
    """
    for row in rows:
        texts = {name: one_line(row.get(name)) for name in captions}
        named = row.get(file) or ""
        if not isinstance(named, Stored | str):
            named = str(named) if isinstance(named, int | float) else ""
        yield named, {name: text for name, text in texts.items() if text}


def texts_beside(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The same for all pictures of a folder and those below it, with `name.txt` as caption.

    Raises:
        UserError: see `walked`.
    """
    for path in sorted(walked(folder)):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and is_picture(path.name, partial(_head, path)):
            try:
                text = one_line(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeDecodeError):
                text = ""
            yield str(name), {"caption": text} if text else {}


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError:
        return b""


def one_line(text: Any) -> str:
    """A caption without line breaks, or "" for what is no text."""
    # JSON can hold halves of surrogate pairs, which UTF-8 cannot.
    return " ".join(text.split()).encode(errors="replace").decode() if isinstance(text, str) else ""


def usable(
    folder: Path,
    named: Iterable[tuple[str | Stored, dict[str, str]]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], dict[str, list[str]]]:
    """The pictures that are there and have a caption, each content once; the others by reason.

    Of several with the same content, or several rows of one file, the first one counts. Only files
    of equal sizes are read.

    Args:
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
        elif not captions:
            refused["no caption"].append(name)
        elif sum(map(len, captions.values())) > MAX_CAPTIONS:
            refused["huge caption"].append(name)
        elif path in seen:
            refused["duplicate"].append(name)
        else:
            seen.add(path)
            rows.append(Row(name, path, size, captions))
    rows, twins = _each_content_once(rows, progress)
    if twins:
        refused["duplicate"] += [row.name for row in twins]
    return rows, dict(refused)


def _size(path: Path) -> int | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _each_content_once(
    rows: Sequence[Row], progress: Callable[[int, int], None] | None
) -> tuple[list[Row], list[Row]]:
    once, twins, contents = [], [], set()
    sizes = Counter(row.size for row in rows)
    for done, row in enumerate(rows, 1):
        content = _content(row.path) if row.size and sizes[row.size] > 1 else None
        (twins if content in contents else once).append(row)
        if content:
            contents.add(content)
        if progress:
            progress(done, len(rows))
    return once, twins


def _content(path: Path | Stored) -> bytes | None:
    if isinstance(path, Stored):
        return path.digest
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None  # packing will find it unreadable
