"""Captions that a captioner wrote of the pictures of shards, joined to samples by (shard, key).

A folder is as of embeddings, with a row of bytes for each caption field: the captions of a sample
in JSON, as a list in UTF-8; an empty row where none was kept. `picture` holds the CRC-32 of each
picture's file, and `left_out` how many of its captions were left out.
"""

import json
import zlib
from collections.abc import Collection
from typing import Any

from cascade.data.embeddings import Embeddings, read_manifest
from cascade.errors import UserError
from cascade.files.stores import places
from cascade.files.stores.places import Place, place

CAPTIONS = "captions"  # the usual folder, beside the shards
FIELD = "long_caption"  # the usual field, as in conf/data/recaptioned.yaml
COMMAND = "run `cascade data caption`"
PICTURE, LEFT_OUT = "picture", "left_out"


class Recaptions(Embeddings):
    """The captions of a folder, whose manifest names the fields."""

    command = COMMAND

    @property
    def fields(self) -> list[str]:
        return self.about.captions if self.about else []

    @property
    def samples(self) -> int:
        """How many captions of a picture there may be."""
        return self.about.settings.get("samples", 1) if self.about else 1

    def of(self, shard: str, key: str) -> dict[str, list[str]]:
        """Return the captions of a sample by field.

        Raises:
            UserError: the shard's file is missing or broken, or has no row for the sample.
        """
        file = self.opened(shard)
        if key not in file:
            raise UserError(
                f"{file.path} has no captions of {key}, so it is of another shard: remove it, then "
                f"{COMMAND}"
            )
        return {field: self._texts(file, field, key) for field in self.fields}

    def _texts(self, file: Any, field: str, key: str) -> list[str]:
        if field not in file.names:
            raise UserError(f"{file.path} has no captions in {field}: remove it, then {COMMAND}")
        row = bytes(file.found(field, key).tolist())
        try:
            return [str(text) for text in json.loads(row)] if row else []
        except ValueError as error:
            raise UserError(f"{file.path} is broken at {key}: remove it, then {COMMAND}") from error

    def check(self, sample: Any) -> None:
        """Check that the captions are of this picture. Raises UserError, and BadSample."""
        file, data = self.opened(sample.shard), sample.read("picture")
        self.of(sample.shard, sample.key)
        if int(file.found(PICTURE, sample.key)) != zlib.crc32(data):
            raise UserError(
                f"{file.path} has captions of another picture than {sample.key} is: remove it, "
                f"then {COMMAND}"
            )


def recaptions_of(folder: str | Place | None, fields: Collection[str]) -> Recaptions | None:
    """Return the captions in a folder; None if there is no folder, so that the JSON's are used.

    Args:
        fields: those that training draws from.

    Raises:
        UserError: the folder is damaged, or holds none of these fields.
    """
    if folder is None:
        return None
    where = place(folder)
    if read_manifest(where, COMMAND) is None:
        if places.is_folder(where) and places.files_of(where, ".safetensors"):
            raise UserError(f"{where} has no manifest: remove it, then {COMMAND}")
        return None
    found = Recaptions(where)
    if not set(found.fields) & set(fields):
        raise UserError(
            f"{where} holds captions in {', '.join(found.fields)}, and training draws from "
            f"{', '.join(fields)}: set data.captions to its fields, or data.recaptions=null"
        )
    return found
