"""Reads rows of parquet tables, including pictures as Hugging Face's `datasets` stores them.

A column of bytes, or of structs {bytes, path}, holds pictures. Their bytes are copied into a
temporary file, a few rows at a time, because packing reads them in shuffled order, and parquet can
only decode whole row groups.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cascade.errors import UserError
from cascade.formats.texts import brief

_ROWS = 64  # held in memory at a time


@dataclass(frozen=True)
class Stored:
    """A picture from a table, in a temporary file that is deleted with its last picture.

    Attributes:
        name: its name in the table, or else the table's name and the row number.
        size: in bytes.
        digest: hash of its content.
    """

    name: str
    size: int
    digest: bytes
    file: IO[bytes]
    offset: int

    def read_bytes(self) -> bytes:
        return os.pread(self.file.fileno(), self.size, self.offset)


def rows(path: Path, spill: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table, with pictures as `Stored`.

    Args:
        spill: an existing folder with space for the pictures; None: pictures are left out.

    Raises:
        UserError: pyarrow is not installed, or the disk is full.
        OSError, ValueError: the table cannot be read, or is damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install cascade-diffusion[parquet]") from error
    with parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"two columns are called {brief(twice[0])}: rename one")
        kinds = {field.name: field.type for field in table.schema_arrow}
        pictures = [name for name, kind in kinds.items() if spill and _holds_pictures(kind)]
        others = [name for name, kind in kinds.items() if "binary" not in str(kind)]
        file = tempfile.TemporaryFile(dir=spill) if pictures else None  # noqa: SIM115 (kept open)
        batches = table.iter_batches(_ROWS, columns=[*others, *pictures])
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield row | {name: _stored(row[name], path, number, file) for name in pictures}


def _holds_pictures(kind: Any) -> bool:
    """Whether columns of this type hold pictures."""
    if str(kind).startswith("struct<"):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return str(kind) in ("binary", "large_binary", "binary_view")


def _stored(value: Any, table: Path, number: int, file: IO[bytes]) -> Stored | str | None:
    """Stores a picture; of one that the table only refers to, returns the path."""
    name, data = (value.get("path"), value["bytes"]) if isinstance(value, dict) else (None, value)
    if data is None:
        return name
    try:
        offset = file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
    except OSError as error:
        raise UserError(
            f"{table}: no space for a copy of its pictures ({error.strerror}): free some"
        ) from error
    digest = hashlib.blake2b(data).digest()
    return Stored(name or f"{table.name}: row {number}", len(data), digest, file, offset)
