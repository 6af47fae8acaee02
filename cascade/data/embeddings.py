"""Precomputed rows beside shards, joined to samples by (shard, key), never by row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.errors import UserError
from cascade.files import write_atomically

MANIFEST = "manifest.json"


class Embeddings:
    """Precomputed rows, joined to samples by key: a folder with one `{shard}.safetensors` per tar.

    A file holds tensors [rows, ...] named by batch key (`clip_image`, `text`, ...); its metadata
    holds the rows' keys, as JSON. Nothing is opened before it is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, tuple[Any, dict[str, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_files": {}}  # open files do not travel to a worker

    @property
    def about(self) -> dict[str, str]:
        """What made them: `encoder`, its `hash`, `dim`; empty if there is no manifest."""
        path = self.folder / MANIFEST
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"{path} is damaged: remove {self.folder}, make it anew") from error

    def row(self, shard: str, key: str) -> dict[str, Tensor]:
        """What belongs to a sample, by batch key. Raises UserError if there is no row for it."""
        file, rows = self._open(shard)
        if key not in rows:
            raise UserError(f"{self.folder} lacks {shard}/{key}: run `cascade data precompute`")
        names = file.keys()
        return {name: file.get_slice(name)[rows[key]] for name in names}

    def has(self, shard: str, key: str) -> bool:
        """Whether there is a row for a sample. Raises UserError if there is none for its shard."""
        return key in self._open(shard)[1]

    def _open(self, shard: str) -> tuple[Any, dict[str, int]]:
        if shard not in self._files:
            path = self.folder / f"{shard}.safetensors"
            try:
                file = safe_open(path, framework="pt")
                keys = json.loads(file.metadata()["keys"])
            except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
                raise UserError(
                    f"{path} is missing or broken: run `cascade data precompute`"
                ) from error
            self._files[shard] = (file, {key: row for row, key in enumerate(keys)})
        return self._files[shard]


def write_embeddings(
    folder: Path,
    shard: str,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes the rows [rows, ...] of a shard, whole or not at all; `metadata`: what made them."""
    if any(len(rows) != len(keys) for rows in tensors.values()) or len(set(keys)) != len(keys):
        raise ValueError(f"{shard}: {len(keys)} keys, not one for each row")
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {**metadata, "keys": json.dumps(list(keys))}
    path = folder / f"{shard}.safetensors"
    write_atomically(path, lambda beside: save_file(rows, beside, about))
