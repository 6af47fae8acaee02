"""Precomputed embeddings of shards, joined to samples by (shard, key), never by row number.

A folder holds one encoder's output: a manifest, and a `{shard}.safetensors` for each tar. Its
tensors are named by batch key (`clip_image`), those of captions by field and batch key
(`txt/text`). Rows of unequal length are concatenated, and `txt/text.offsets` [rows + 1] holds the
start of each; an empty row stands for a missing caption. The metadata holds the keys.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cascade.data.transforms import BadSample
from cascade.errors import UserError
from cascade.files.stores import places
from cascade.files.stores.places import Place, Remote, place
from cascade.files.stores.reading import opened
from cascade.formats.tensors import RangedTensors

MANIFEST = "manifest.json"
EMBEDDINGS, TEXT = "embeddings", "text"  # default folders next to shards, as in conf/
OFFSETS = ".offsets"
OPEN_FILES = 64  # per folder: at least as many tars as the samples of a batch come from

COMMAND = "run `cascade data precompute`"


@dataclass(frozen=True)
class Manifest:
    """How the rows of a folder were made.

    Attributes:
        encoder: its name or directory.
        hash: of its weights and architecture; in earlier versions, of the weights alone.
        sizes: the width of a row, or of each of its states, by batch key.
        dtypes: of the rows, by batch key.
        unit_norm: batch keys whose rows have norm 1; others are as the encoder returns them.
        captions: the caption fields that were encoded; empty for pictures.
        length: the most tokens that the encoder reads of a caption.
        several: which of several captions in a field was encoded (`data.several`).
        settings: what else the rows depend on, for people: the hash covers it.
    """

    encoder: str
    hash: str
    sizes: dict[str, int]
    dtypes: dict[str, str]
    unit_norm: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    length: int | None = None
    several: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Place) -> None:
        about = asdict(self)
        if not self.settings:
            del about["settings"]  # which earlier versions do not know
        places.write_text(folder / MANIFEST, json.dumps(about, indent=2) + "\n")


def read_manifest(folder: Place, command: str = COMMAND) -> Manifest | None:
    """Read the manifest of a folder, None if it has none. Raises UserError if it is damaged.

    Args:
        command: which writes such a folder.
    """
    path = folder / MANIFEST
    try:
        about = json.loads(places.read_bytes(path))
        if not (isinstance(about["sizes"], dict) and isinstance(about["hash"], str)):
            raise TypeError(about)
        return Manifest(**about)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged or old: remove {folder}, then {command}") from error


class Embeddings:
    """The rows of a folder. Files are opened on first use, and few are open at a time."""

    command = COMMAND  # that writes such a folder

    def __init__(self, folder: str | Place):
        self.folder = place(folder)
        self._files: dict[str, Rows] = {}  # least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_files": {}}  # open files cannot be sent to workers

    @cached_property
    def about(self) -> Manifest | None:
        """The manifest, None if there is none. Raises UserError if it is damaged."""
        return read_manifest(self.folder, self.command)

    def require(self, shards: Collection[str]) -> None:
        """Raise UserError if some shards have no file. Lists the folder without opening files.

        (A web server lists none: there, what is missing is found when it is needed.)
        """
        if isinstance(self.folder, Remote) and not self.folder.is_listed:
            return
        there = {one.stem for one in places.files_of(self.folder, ".safetensors")}
        if lacking := sorted(set(shards) - there):
            raise UserError(
                f"{self.folder} lacks {len(lacking)} of {len(shards)} shards, such as "
                f"{lacking[0]}: {self.command}"
            )

    def row(self, shard: str, key: str, caption: str = "txt") -> dict[str, Tensor]:
        """Return a sample's rows by batch key; `text` [n, w] has the caption's own length.

        Args:
            caption: the field that its caption was drawn from.

        Raises:
            BadSample: the sample has no row.
            UserError: the shard's file is missing or broken, or has no rows for that field.
        """
        file, found = self.opened(shard), {}
        for name in file.names:
            of, _, batch_key = name.rpartition("/")
            if of in ("", caption):
                found[batch_key] = file.row(name, key)
        if not found:
            raise UserError(
                f"{file.path} has no rows for captions of {caption}: {self.command} with "
                "--captions into another folder"
            )
        return found

    def opened(self, shard: str) -> "Rows":
        """Return the file of a shard. Raises UserError if it is missing or broken."""
        file = self._files.pop(shard, None)
        if file is None:
            file = Rows(self.folder / f"{shard}.safetensors", self.about, self.command)
            if len(self._files) >= OPEN_FILES:
                del self._files[next(iter(self._files))]
        self._files[shard] = file
        return file


class Rows:
    """An open file: the `names` of its tensors, and their rows by key."""

    def __init__(self, path: Place, about: Manifest | None, command: str):
        self.path, self.command = path, command
        try:
            remote = isinstance(path, Remote)
            self._file = RangedTensors(opened(path)) if remote else safe_open(path, framework="pt")
            metadata = self._file.metadata()
            keys = json.loads(metadata["keys"])
            self._place = {key: row for row, key in enumerate(keys)}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is missing or broken: {self.command}") from error
        tensors = self._file.keys()
        self.names = [name for name in tensors if not name.endswith(OFFSETS)]
        ragged = [name for name in self.names if name + OFFSETS in tensors]
        self._offsets = {name: self._file.get_tensor(name + OFFSETS) for name in ragged}
        if about and metadata.get("hash", about.hash) != about.hash:
            raise UserError(
                f"{path} was made by another encoder ({metadata['hash']}) than its manifest names "
                f"({about.hash}): remove it, then {self.command}"
            )
        for name in self.names:
            self._check(name, len(keys), about)

    def _check(self, name: str, keys: int, about: Manifest | None) -> None:
        shape, offsets = self._file.get_slice(name).get_shape(), self._offsets.get(name)
        rows = _count(shape[0], offsets)
        if rows != keys or len(self._place) != keys:
            raise UserError(
                f"{self.path} has {rows} rows of {name} for {len(self._place)} keys: remove it, "
                f"then {self.command}"
            )
        size = about and about.sizes.get(name.rpartition("/")[2])
        if size and shape[-1] != size:
            raise UserError(
                f"{self.path} has rows of {shape[-1]} numbers of {name}, but its manifest says "
                f"{size}: remove it, then {self.command}"
            )

    def row(self, name: str, key: str) -> Tensor:
        """Return a row that is not empty. Raises BadSample."""
        if key not in self or not len(found := self.found(name, key)):
            raise BadSample("no embedding")
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def tensor(self, name: str) -> Tensor:
        """Return all rows of a name."""
        return self._file.get_tensor(name)

    def filled(self, name: str) -> int:
        """Count the rows that are not empty."""
        return int((self._offsets[name].diff() > 0).sum())

    def found(self, name: str, key: str) -> Tensor:
        """Return a row, which may be empty if rows differ in length."""
        row, rows = self._place[key], self._file.get_slice(name)
        if name not in self._offsets:
            return rows[row]
        start, end = self._offsets[name][row : row + 2].tolist()
        return rows[start:end]


def _count(length: int, offsets: Tensor | None) -> int:
    """Count the rows of a tensor of this length; -1 if the offsets do not fit it."""
    if offsets is None:
        return length
    rising = len(offsets) > 0 and bool((offsets.diff() >= 0).all())
    return len(offsets) - 1 if rising and offsets[0] == 0 and offsets[-1] == length else -1


def write_embeddings(
    folder: Place,
    shard: str,
    keys: Sequence[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the rows of a shard atomically.

    Args:
        tensors: [rows, ...] each; with `.offsets`, concatenated rows.
        metadata: the `hash` of the encoder.
    """
    names = [name for name in tensors if not name.endswith(OFFSETS)]
    counts = {_count(len(tensors[name]), tensors.get(name + OFFSETS)) for name in names}
    if counts != {len(keys)} or len(set(keys)) != len(keys):
        raise ValueError(f"{shard}: {len(keys)} keys, not one for each row")
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {**metadata, "keys": json.dumps(list(keys))}
    path = folder / f"{shard}.safetensors"
    places.write(path, lambda partial: save_file(rows, partial, about))


def padded(
    states: Sequence[Float[Tensor, "_ w"]],
) -> dict[str, Float[Tensor, "b n w"] | Bool[Tensor, "b n"]]:
    """Return `text` and `text_mask` of a batch: states padded to the longest."""
    lengths = torch.tensor([len(s) for s in states])
    text = pad_sequence(list(states), batch_first=True)
    return {"text": text, "text_mask": torch.arange(text.shape[1]) < lengths[:, None]}
