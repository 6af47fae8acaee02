"""Reads tables of captions in common formats, and finds their columns.

Without instructions a column is chosen only by an exact, well-known name, and if it holds text. If
two columns qualify, the user is asked: nothing is guessed.
"""

import csv
import glob
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cascade.errors import UserError, explained
from cascade.files.atomic import matching
from cascade.formats import parquet
from cascade.formats.parquet import Stored
from cascade.formats.texts import brief, lines, one_line, read

FILE_COLUMNS = (
    *("file_name", "filename", "file", "file_path", "filepath"),
    *("image", "image_file", "image_path", "picture", "path", "name"),
)
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "prompt", "prompts")
CAPTION_COLUMNS = (
    *TEXT_COLUMNS,
    *("long_caption", "short_caption", "alt", "alt_text", "title", "description"),
)

Caption = str | list[str]  # a list: several captions of one picture

_PART = re.compile(r"(.+)-(\d+)-of-(\d+)\b.*")  # train-00000-of-00003.parquet


def table(path: Path, spill: Path | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a CSV, TSV, JSONL, parquet or TXT file, or of a table in several parts.

    A TXT file has one caption per line (column `prompt`), or an id, a tab and a caption.

    Args:
        path: a file, a folder of parts, or a glob pattern, if no file has that name.
        spill: folder to copy pictures in parquet to (see `parquet.rows`).

    Raises:
        UserError: the file is of another kind, unreadable or damaged; the parts are of several
            tables, or incomplete; or pyarrow is not installed.
    """
    rows = [row for part in _parts(path) for row in _rows(part, spill)]
    if not rows:
        raise UserError(f"{path} has no rows: give a table with a header and a row per picture")
    return rows


def _parts(path: Path) -> list[Path]:
    if path.is_dir():
        kinds = READERS.keys() - {".txt"}  # a .txt may belong to a single picture
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in kinds and p.name[0] != ".")
    elif path.exists() or not glob.has_magic(str(path)):
        return [path]
    else:
        found = matching(path)
    if not found:
        raise UserError(f"{path} has no table: give one that ends in {', '.join(READERS)}")
    parts = [(p, _PART.fullmatch(p.name)) for p in found]
    named = sorted({match[1] if match else p.suffix for p, match in parts})
    if len(named) > 1:
        raise UserError(
            f"{path} has tables of {brief(named[0])} and {brief(named[1])}: give one of them, or a "
            "pattern in quotes"
        )
    numbers = {int(match[2]) for _, match in parts if match}
    count = max((int(match[3]) for _, match in parts if match), default=0)
    if lacking := sorted(set(range(count)) - numbers):
        raise UserError(f"{path} lacks {len(lacking)} of {count} parts: fetch part {lacking[0]}")
    return found


def _rows(path: Path, spill: Path | None) -> list[dict[str, Any]]:
    readers = {**READERS, ".parquet": partial(parquet.rows, spill=spill)}
    if not (reader := readers.get(path.suffix.lower() or ".txt")):
        raise UserError(f"{path}: give a table of captions that ends in {', '.join(READERS)}")
    try:
        with explained(f"cannot read {path}"):
            return list(reader(path))
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {brief(error, 200)}") from error


def _separated(path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    # newline="\n": line breaks within quotes stay as they are, and lines end at line feeds only.
    rows = csv.reader(io.StringIO(read(path), newline="\n"), delimiter=delimiter, strict=True)
    header = _distinct(next(rows, []))
    for fields in filter(None, rows):
        if len(fields) != len(header):  # an unquoted comma would cut a caption short
            raise ValueError(
                f"line {rows.line_num} has {len(fields)} fields, the header {len(header)}; "
                "put quotes around values that contain a separator"
            )
        yield dict(zip(header, fields))


def _tabs(path: Path) -> Iterator[dict[str, str]]:
    """Reads a TSV, in which quotes are usually plain characters, but may come from a CSV writer.

    Quoting is recognised by a quoted header, or by what only a CSV writer produces.
    """
    rows = [line.split("\t") for line in lines(read(path)) if line]
    even = all(len(row) == len(rows[0]) for row in rows)
    fields = list(chain(*rows))
    known = bool(fields) and (fields[0].startswith('"') or any(map(_doubled, fields)))
    if not even or any(field.startswith('"') for field in fields):
        try:
            quoted = list(_separated(path, "\t"))
        except (ValueError, csv.Error):
            if not even:
                raise
        else:
            if known or not even:
                yield from quoted
                return
            if len(quoted) < len(rows) - 1:
                raise ValueError(
                    "a value in quotes has a line break, or some rows have single quotation marks: "
                    "save it as CSV or JSONL"
                )
    header = _distinct(rows[0]) if rows else []
    yield from (dict(zip(header, row)) for row in rows[1:])


def _doubled(field: str) -> bool:
    """Whether a field is quoted in a way that only a CSV writer does."""
    inside = field[1:-1] if field[:1] == field[-1:] == '"' else ""
    within = '""' in inside or "\r" in inside
    return field == '""' or (within and '"' not in inside.replace('""', ""))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines(read(path)), 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _distinct([name for name, _ in pairs])
    return dict(pairs)


def _lines(path: Path) -> list[dict[str, str]]:
    numbered = [(n, line) for n, line in enumerate(lines(read(path)), 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no prompts or captions: write one on each line")
    tabs = [line.count("\t") for _, line in numbered]
    if not any(tabs):
        return [{"prompt": line.strip()} for _, line in numbered]
    if odd := [n for (n, _), count in zip(numbered, tabs) if count != 1]:
        raise UserError(
            f"{path}: line {odd[0]} is not an id, a tab and a caption, as other lines are: use one "
            "form for all lines"
        )
    return [dict(zip(("id", "caption"), line.split("\t"))) for _, line in numbered]


def _distinct(names: Sequence[str]) -> Sequence[str]:
    """Returns the names. Raises ValueError if two are equal, which would lose a column."""
    counts = Counter(filter(None, names))  # spreadsheets add empty columns without a name
    if twice := [name for name, n in counts.items() if n > 1]:
        raise ValueError(f"two columns are called {brief(twice[0])}: rename one")
    return names


READERS: Mapping[str, Callable[[Path], Any]] = {
    ".csv": _separated,
    ".tsv": _tabs,
    ".jsonl": _json_lines,
    ".parquet": parquet.rows,
    ".txt": _lines,
}


def named(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], kinds: type | tuple[type, ...]
) -> list[str]:
    """Finds columns by name, ignoring case, that hold at least one value of these types.

    They are returned in the order of `names`, that is by preference.
    """
    there = dict.fromkeys(name for row in rows for name in row)
    found = [name for known in names for name in there if name.lower() == known]
    return [name for name in found if any(isinstance(row.get(name), kinds) for row in rows)]


def text_column(path: Path, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column of prompts or captions, or None. Raises UserError if two columns qualify."""
    found = named(rows, TEXT_COLUMNS, str)
    if len(found) > 1:
        raise UserError(
            f"{path} has the columns {' and '.join(map(brief, found))}: keep one of them"
        )
    return found[0] if found else None


def columns(
    rows: Sequence[Mapping[str, Any]], file: str | None = None, captions: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """The column of file names and those of captions: as given, or by well-known names.

    Raises:
        UserError: there is no such column, or several may hold the captions.
    """
    there = list(dict.fromkeys(name for row in rows for name in row))
    wrong = [name for name in (file, *captions) if name and name not in there]
    file = file or next(iter(_of_pictures(rows) or named(rows, FILE_COLUMNS, (str, int))), None)
    known = [name for name in named(rows, CAPTION_COLUMNS, (str, list)) if name != file]
    if wrong or not file or not (captions or known):
        what = brief(wrong[0]) if wrong else "a caption" if file else "a file"
        raise UserError(
            f"no column for {what} among {', '.join(map(brief, there[:20]))}: name them with "
            "--file-column and --caption-columns"
        )
    if not named(rows, [file.lower()], (str, int, Stored)):
        raise UserError(f"the column {brief(file)} holds no file names: give --file-column")
    if not captions and len(known) > 1:
        known.sort(key=there.index)
        raise UserError(
            f"the columns {', '.join(known)} may all hold captions: name those to use with "
            "--caption-columns, the one for the .txt files first"
        )
    return file, list(captions) or known


def _of_pictures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The column of embedded pictures, if any. Raises UserError if there are several."""
    held = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, Stored)))
    if len(held) > 1:
        raise UserError(
            f"the columns {', '.join(held)} hold pictures: choose one with --file-column"
        )
    return held


def rows_of_table(
    rows: Sequence[Mapping[str, Any]], file: str, captions: Sequence[str]
) -> Iterator[tuple[str | Stored, dict[str, Caption]]]:
    """Yields each row's file name and captions by column; empty captions are left out.

    A picture embedded in the table takes the place of its file name.
    """
    for row in rows:
        found = {column: text for column in captions if (text := captions_in(row.get(column)))}
        name = row.get(file)
        words = str(name) if isinstance(name, str | int) else ""
        yield name if isinstance(name, Stored) else words, found


def captions_in(value: Any) -> Caption:
    """Normalises a caption: a list with one text becomes that text, anything but text ""."""
    if not isinstance(value, list):
        return one_line(value)
    found = [text for text in map(one_line, value) if text]
    return found if len(found) > 1 else "".join(found)


def as_one(caption: Caption) -> str:
    """Joins all captions of a picture."""
    return caption if isinstance(caption, str) else " ".join(caption)
