"""Rows of parquet tables, with pictures in them as Hugging Face's `datasets` writes them.

A column of bytes, or of structs {bytes, path}, is one of pictures. Their bytes are copied into a
temporary file, a few rows at a time, since packing reads them in a shuffled order, and parquet
gives none of a row group without all of it.
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
from cascade.texts import brief

_ROWS = 64  # in memory at a time


@dataclass(frozen=True)
class Stored:
    """A picture of a table, in a temporary file that vanishes with the last one of it.

    Attributes:
        name: that the table gives it, or else the table's and the row's number.
        size: in bytes.
        digest: of its content.
    """

    name: str
    size: int
    digest: bytes
    file: IO[bytes]
    offset: int

    def read_bytes(self) -> bytes:
        return os.pread(self.file.fileno(), self.size, self.offset)


def rows(path: Path, spill: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table, in which a picture is a `Stored`.

    Args:
        spill: an existing folder with room for the pictures; None: they are left out.

    Raises:
        UserError: pyarrow is not installed, or there is no room.
        OSError, ValueError: it cannot be read, or is damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path} takes pyarrow to read: pip install cascade-diffusion[parquet]"
        ) from error
    with parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"two columns are called {brief(twice[0])}: rename one")
        kinds = {field.name: field.type for field in table.schema_arrow}
        pictures = [name for name, kind in kinds.items() if spill and _holds_pictures(kind)]
        others = [name for name, kind in kinds.items() if "binary" not in str(kind)]
        file = tempfile.TemporaryFile(dir=spill) if pictures else None  # noqa: SIM115 (kept open)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=[*others, *pictures]):
            some = batch.to_pylist()
            for row in some:
                number += 1
                row |= {name: _stored(row[name], path, number, file) for name in pictures}
            yield from some


def _holds_pictures(kind: Any) -> bool:
    """Of a column's type."""
    if str(kind).startswith("struct<"):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return str(kind) in ("binary", "large_binary", "binary_view")


def _stored(value: Any, table: Path, number: int, file: IO[bytes]) -> Stored | str | None:
    """Of a picture that is not in the table itself, the path that the table gives."""
    name, data = (value.get("path"), value["bytes"]) if isinstance(value, dict) else (None, value)
    if data is None:
        return name
    try:
        offset = file.seek(0, os.SEEK_END)
        file.write(data)
        file.flush()
    except OSError as error:
        raise UserError(
            f"{table}: no room for a copy of its pictures ({error.strerror})"
        ) from error
    digest = hashlib.blake2b(data).digest()
    return Stored(name or f"{table.name}: row {number}", len(data), digest, file, offset)
