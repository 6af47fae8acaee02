"""Which samples a tar holds and where: one pass over its headers, and no sample is read.

A sample is a run of neighbouring members with one key, the name up to the first dot of its base
name (the WebDataset convention); extensions are lower-cased, and empty members count as missing.
What a pass finds may be kept beside the tar, in `{shard}.index` (safetensors, with a checksum); it
does not depend on which captions are asked for.
"""

import glob
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cascade.errors import UserError
from cascade.files import write_atomically

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
MEMBERS = ("picture", *CAPTIONS)
CUT = "cut short"

# What a stranger's tar may ask for: longer members are bad samples, and never read.
LIMITS = {"picture": 2**26, "txt": 2**20, "json": 2**20}  # bytes
MAX_HEADER = 2**20  # bytes of an extended header, all of which tarfile keeps in memory
HOSTILE = re.compile(r"^/|(^|/)\.\.(/|$)|[\0-\x1f\x7f]")  # keys that lead elsewhere, or are no line

_ARRAYS = ("names", "ends", "spans")
_PADDING = 2**20  # zeros behind the end of a tar: more than any usual record

Paths = str | Path | Sequence[str | Path]
Groups = list[tuple[str, dict[str, tuple[int, int]]]]  # a key, and (offset, bytes) by extension


@dataclass(frozen=True)
class Summary:
    """The numbers of one tar: its size, its time, its samples, and those left out by reason.

    Attributes:
        samples: with a picture and a caption, that is a `txt` or a `json`.
        txt, json: of these, those that have one.
    """

    bytes: int
    mtime_ns: int
    samples: int
    txt: int
    json: int
    left_out: dict[str, int]

    def usable(self, captions: Set[str]) -> int:
        """How many samples have one of these members."""
        return self.samples if len(captions) > 1 else getattr(self, *captions)


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one tar that have a picture and a caption, in its order.

    Attributes:
        tar: where it lies, with its size and time as they were when it was read.
        names, ends: the keys one behind the other in UTF-8, and where each ends.
        spans: offset and bytes of each sample's picture, txt and json; 0 bytes: it has none.
        left_out: how many samples were left out, by reason.
    """

    tar: Path
    bytes: int
    mtime_ns: int
    names: UInt8[np.ndarray, " b"]
    ends: Int64[np.ndarray, " n"]
    spans: Int64[np.ndarray, "n 3 2"]
    left_out: Counter[str]

    def key(self, row: int) -> str:
        start = self.ends[row - 1] if row else 0
        return self.names[start : self.ends[row]].tobytes().decode(errors="surrogateescape")

    def usable(self, captions: Set[str]) -> Int64[np.ndarray, " m"]:
        """The rows that have one of these members, of "txt" and "json"."""
        columns = [MEMBERS.index(caption) for caption in captions]
        return np.flatnonzero(self.spans[:, columns, 1].any(1))

    @property
    def summary(self) -> Summary:
        txt, fields = (int((self.spans[:, i, 1] > 0).sum()) for i in (1, 2))
        left_out = dict(self.left_out)
        return Summary(self.bytes, self.mtime_ns, len(self.ends), txt, fields, left_out)


def tars(path: Paths, split: str) -> list[Path]:
    """The tars of a folder, a glob or a list that belong to a split, by name.

    Raises:
        UserError: there is none, all belong to other splits, or two have the same name.
    """
    if listed := not isinstance(path, str | Path):
        names = path
    else:
        names = Path(path).glob("*.tar") if Path(path).is_dir() else glob.glob(str(path))
    found = sorted(Path(name) for name in names)
    if not found:
        raise UserError(f"{path}: no .tar is there; give the folder of the shards, or a glob")
    splits = {match[1] for tar in found if (match := re.match(r"([a-zA-Z]\w*)-", tar.name))}
    chosen = [tar for tar in found if tar.name.startswith(f"{split}-")]
    if not chosen and (listed or not splits):
        chosen = found
    if not chosen:
        raise UserError(f"{path} has no {split}-*.tar: choose a split of {sorted(splits)}")
    if twice := [stem for stem, n in Counter(tar.stem for tar in chosen).items() if n > 1]:
        raise UserError(f"two shards are called {twice[0]}: rename one, as names tell them apart")
    return chosen


def counted(reasons: Mapping[str, int]) -> str:
    """ "3 no caption, 1 no picture"; "none" of nothing."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(reasons).most_common()) or "none"


def scan(tar: Path) -> Index:
    """The samples of a tar, found by reading its headers.

    Of samples with equal keys the first one with a picture and a caption counts. The last sample
    of a tar that was cut short is left out: nobody can say whether it is whole.

    Raises:
        UserError: the tar cannot be opened.
    """
    groups, whole, stat = _groups(tar)
    left_out: Counter[str] = Counter()
    if not whole:
        groups = groups[:-1]
        left_out[CUT] += 1
    kept: dict[str, list[tuple[int, int]]] = {}
    for key, members in groups:
        picture = next((members[e] for e in PICTURES if e in members), None)
        if HOSTILE.search(key):
            left_out["hostile name"] += 1
        elif not picture:
            left_out["no picture"] += 1
        elif members.keys().isdisjoint(CAPTIONS):
            left_out["no caption"] += 1
        elif key in kept:
            left_out["duplicate key"] += 1
        else:
            kept[key] = [picture, *(members.get(e, (0, 0)) for e in CAPTIONS)]
    names = [key.encode(errors="surrogateescape") for key in kept]
    return Index(
        tar,
        stat.st_size,
        stat.st_mtime_ns,
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array(list(kept.values()), np.int64).reshape(-1, 3, 2),
        left_out,
    )


class Header(tarfile.TarInfo):
    """The header of a member; one of an impossible size is a damaged one.

    (tarfile takes a negative size for a way back, and goes round for ever.)
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile's own hook
        if self.size < 0 or (self.size > MAX_HEADER and not self.isreg()):
            raise tarfile.InvalidHeaderError("bad size")
        return super()._proc_member(archive)


def _groups(tar: Path) -> tuple[Groups, bool, os.stat_result]:
    """All runs of members with one key, and whether the tar has its end."""
    groups, end = [], 0
    try:
        with open(tar, "rb") as file:
            stat = os.fstat(file.fileno())
            try:
                with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
                    while member := archive.next():
                        archive.members.clear()  # or it would keep them all
                        end = member.offset_data + -(-member.size // 512) * 512
                        _append(groups, member)
                        if not 0 <= member.size <= stat.st_size - member.offset_data:
                            return groups, False, stat
            except (tarfile.TarError, ValueError, RecursionError):
                return groups, False, stat
            # tarfile takes a damaged header for the end, but the end is a block of zeros, and
            # nothing but some zeros follows it: a file that was never filled has more of them.
            file.seek(end)
            rest = file.read(_PADDING + 1)
            return groups, len(rest) in range(512, _PADDING + 1) and not any(rest), stat
    except OSError as error:
        raise UserError(f"cannot read {tar}: {os.strerror(error.errno or 0)}") from error


def _append(groups: Groups, member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or not member.isreg() or member.issparse():
        return
    key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
    if not groups or groups[-1][0] != key or extension in groups[-1][1]:
        groups.append((key, {}))
    if member.size:
        groups[-1][1][extension] = (member.offset_data, member.size)


def save(index: Index) -> None:
    """Writes an index beside its tar."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    about = {
        "bytes": str(index.bytes),
        "mtime_ns": str(index.mtime_ns),
        "left_out": json.dumps(index.left_out),
    }
    about["checksum"] = _checksum(arrays, about)
    path = index.tar.with_suffix(".index")
    write_atomically(path, lambda beside: save_file(arrays, beside, about))


def load(tar: Path) -> Index:
    """The index beside a tar.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path, remedy = tar.with_suffix(".index"), f"run `cascade data index {tar.parent}`"
    try:
        with safe_open(path, framework="np") as file:
            about = dict(file.metadata())
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if about.pop("checksum") != _checksum(arrays, about):
            raise ValueError("another checksum")
        left_out = Counter(json.loads(about["left_out"]))
        return Index(tar, int(about["bytes"]), int(about["mtime_ns"]), **arrays, left_out=left_out)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {remedy}") from error


def check_unchanged(tar: Path, then: Index | Summary) -> None:
    """Raises UserError if a tar has another size or time than when it was indexed."""
    try:
        stat = tar.stat()
    except OSError as error:
        raise UserError(f"cannot read {tar}: {os.strerror(error.errno or 0)}") from error
    if (stat.st_size, stat.st_mtime_ns) != (then.bytes, then.mtime_ns):
        raise UserError(
            f"{tar} is not as it was when it was indexed: run `cascade data index {tar.parent}` "
            "(a copy keeps its time with cp -p or rsync -t)"
        )


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, str]) -> str:
    value = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in _ARRAYS:
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, value)
    return f"{value:08x}"
