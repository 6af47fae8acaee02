"""The captions of a set of pictures: a file with ids, or a text file next to each picture.

Every picture has exactly one caption, and every caption a picture: a score of pairs is then a score
of exactly the given set.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade.encoders.text import tokenize
from cascade.errors import UserError
from cascade.eval.pictures.sets import PictureSet
from cascade.formats.rgb import ENDINGS
from cascade.formats.tables import FILE_COLUMNS, named, table, text_column
from cascade.formats.texts import BadText, brief, decoded, one_line

CAPTIONS = "captions.jsonl"  # in a folder written by `cascade generate`
IDS = ("id", "key", *FILE_COLUMNS)

CaptionRow = dict[str, Any]  # "id", "caption", and the other columns of a captions file


def there(pictures: PictureSet) -> bool:
    """Whether there are captions next to the pictures."""
    return (pictures.path / CAPTIONS).is_file() or not pictures.spans.keys().isdisjoint(
        pictures.texts
    )


def captioned(pictures: PictureSet, file: Path | None = None) -> list[CaptionRow]:
    """A row with `id` and `caption` for each picture, in the set's order.

    Args:
        file: .jsonl, .csv, .tsv or .parquet with a column of ids (or file names) and one of
            captions, or a .txt whose lines are an id, a tab and a caption. Default: the set's own
            captions.jsonl, or else a .txt next to each picture.

    Raises:
        UserError: ids and pictures do not match one to one, or a caption is empty.
    """
    file = file or (pictures.path / CAPTIONS if (pictures.path / CAPTIONS).is_file() else None)
    where = file or pictures.path
    rows: dict[str, CaptionRow] = {}
    for row in rows_of(file) if file else _beside(pictures):
        if row["id"] in rows:
            raise UserError(f"{where} has two captions for {brief(row['id'])}: remove one")
        if not row["caption"]:
            raise UserError(f"{where} has an empty caption for {brief(row['id'])}: write one")
        rows[row["id"]] = row
    missing = [name for name in pictures.ids if name not in rows]
    foreign = rows.keys() - set(pictures.ids)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures have no caption in {where}, such as "
            f"{missing[0]}: add a caption for each"
        )
    if foreign:
        raise UserError(
            f"{where} has captions of {len(foreign)} pictures that {pictures.path} lacks, such as "
            f"{brief(min(foreign))}: remove these captions"
        )
    return [rows[name] for name in pictures.ids]


def hash_of(rows: Sequence[CaptionRow]) -> str:
    """Sixteen hexadecimal digits of all ids and captions."""
    pairs = json.dumps([[row["id"], row["caption"]] for row in rows])
    return hashlib.sha256(pairs.encode()).hexdigest()[:16]


def too_long(captions: Sequence[str], length: int) -> list[bool]:
    """Whether each caption has more tokens than a CLIP's context `length`.

    Such a caption is truncated and keeps its end-of-text token (`encoders.text.tokenize`).
    """
    # With one more token, the last one is zero (padding) unless the caption is too long.
    parts = [captions[i : i + 1024] for i in range(0, len(captions), 1024)]
    return [bool(last) for part in parts for last in tokenize(part, length + 1)[:, -1]]


def rows_of(file: Path) -> list[CaptionRow]:
    """The rows of a captions file (see `captioned`); ids lose the endings of picture files.

    Raises:
        UserError: the file is missing or damaged, or lacks a column of ids or of captions.
    """
    rows = table(file)
    ids, texts = next(iter(named(rows, IDS, (str, int))), None), text_column(file, rows)
    if file.suffix.lower() == ".txt" and ids is None:
        raise UserError(f"{file}: line 1 is not an id, a tab and a caption: write each so")
    if ids is None or texts is None:
        there = dict.fromkeys(name for row in rows for name in row)
        raise UserError(
            f"{file} has the columns {', '.join(map(brief, there))}: name one id and one caption"
        )
    return [
        {**row, "id": _without_ending(str(row.get(ids))), "caption": one_line(row.get(texts))}
        for row in rows
    ]


def _beside(pictures: PictureSet) -> Iterator[CaptionRow]:
    for name, span in pictures.texts.items():
        if name in pictures.spans:
            try:
                text = decoded(span.read())
            except BadText as error:
                raise UserError(f"{pictures.path}: the text of {name} is {error}") from error
            yield {"id": name, "caption": one_line(text)}


def _without_ending(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    return stem if ending.lower() in ENDINGS else name
