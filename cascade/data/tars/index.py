"""Finds the samples of a tar in one pass over its headers, without reading any sample.

The result can be stored next to the tar, in `{shard}.index` (safetensors, with a checksum); it
does not depend on which captions are used. A stored index also has what takes reading all bytes: a
digest of the tar, which identifies it after it was moved or renamed, and a hash of each picture, by
which pictures are held out (`cascade.data.tars.splits`).
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cascade.data.tars import keys as rules
from cascade.data.tars.keys import CAPTIONS, FIRST_DOT
from cascade.data.tars.splits import ALL, HELD_OUT, content_number, is_held_out
from cascade.data.tars.tar import contents
from cascade.errors import UserError, explained
from cascade.files.atomic import write_atomically

MEMBERS = ("picture", *CAPTIONS)
CUT = "cut short"

# Tars are not trusted: longer members are bad samples, and are never read.
LIMITS = {"picture": 2**26, "txt": 2**20, "json": 2**20}  # bytes

_ARRAYS = ("names", "ends", "spans")


@dataclass(frozen=True)
class Summary:
    """The counts of one tar: its size, modification time, samples, and those left out by reason.

    Attributes:
        samples: how many have a picture and a caption (a `txt` or a `json`).
        txt, json: how many of these have one.
        such_as: for each reason, a member of a sample that was left out.
        digest: of all its bytes; "" if it was not read.
        held_out: how many of `samples`, `txt` and `json` are held out.
    """

    bytes: int
    mtime_ns: int
    samples: int
    txt: int
    json: int
    left_out: dict[str, int]
    such_as: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    held_out: dict[str, int] = field(default_factory=dict)

    def usable(self, captions: Set[str], part: str = ALL) -> int:
        """Count the samples of a part that have one of these members."""
        of = "samples" if len(captions) > 1 else next(iter(captions))
        whole, held_out = getattr(self, of), self.held_out.get(of, 0)
        return {ALL: whole, HELD_OUT: held_out}.get(part, whole - held_out)


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one tar that have a picture and a caption, in the tar's order.

    Attributes:
        tar: its path; `bytes` and `mtime_ns` are its size and time when it was indexed.
        names, ends: the keys, concatenated in UTF-8, and the end of each.
        spans: offset and size of each sample's picture, txt and json; size 0 if it has none.
        left_out: how many samples were left out, by reason; `such_as` names a member of one.
        keys: where a key ends in a name (`cascade.data.tars.keys`).
        digest: of all its bytes; "" if it was not read.
        numbers: the hash of each picture (`content_number`); None if it was not read.
    """

    tar: Path
    bytes: int
    mtime_ns: int
    names: UInt8[np.ndarray, " b"]
    ends: Int64[np.ndarray, " n"]
    spans: Int64[np.ndarray, "n 3 2"]
    left_out: Counter[str]
    such_as: dict[str, str] = field(default_factory=dict)
    keys: str = FIRST_DOT
    digest: str = ""
    numbers: Int64[np.ndarray, " n"] | None = None

    def key(self, row: int) -> str:
        start = self.ends[row - 1] if row else 0
        return self.names[start : self.ends[row]].tobytes().decode(errors="surrogateescape")

    def usable(
        self, captions: Set[str], part: str = ALL, share: float = 0.0
    ) -> Int64[np.ndarray, " m"]:
        """Return the rows of a part that have one of the members "txt" and "json".

        Args:
            share: the fraction of the pictures that is held out.

        Raises:
            UserError: pictures are held out, but the index has no hashes.
        """
        columns = [MEMBERS.index(caption) for caption in captions]
        chosen = self.spans[:, columns, 1].any(1)
        if part != ALL and share:
            if self.numbers is None:
                again = remedy(self.tar.parent)
                raise UserError(f"{self.tar} was indexed by an older version: {again}")
            held_out = is_held_out(self.numbers, share)
            chosen = chosen & (held_out if part == HELD_OUT else ~held_out)
        return np.flatnonzero(chosen)

    def summary(self, share: float = 0.0) -> Summary:
        """Return the summary with a fraction `share` of the pictures held out."""
        members = {"samples": set(CAPTIONS), "txt": {"txt"}, "json": {"json"}}
        counts = {name: len(self.usable(of)) for name, of in members.items()}
        held_out = {n: len(self.usable(of, HELD_OUT, share)) for n, of in members.items() if share}
        about = dict(self.left_out), dict(self.such_as), self.digest, held_out
        return Summary(self.bytes, self.mtime_ns, *counts.values(), *about)


def remedy(folder: Path) -> str:
    return f"run `cascade data index {folder}`"


def counted(reasons: Iterable[str], such_as: Mapping[str, str] | None = None) -> str:
    """Format reasons: "3 no caption (such as a.jpg), 1 no picture"; "none" if empty.

    Args:
        reasons: with duplicates, or a mapping to the number of each.
    """
    named = {reason: f" (such as {name})" for reason, name in (such_as or {}).items()}
    parts = (f"{n} {reason}{named.get(reason, '')}" for reason, n in Counter(reasons).most_common())
    return ", ".join(parts) or "none"


def scan(tar: Path, keys: str = FIRST_DOT) -> Index:
    """Find the samples of a tar by reading its headers.

    Of samples with equal keys, the first with a picture and a caption counts. The last sample of a
    truncated tar is left out, since it may be incomplete.

    Args:
        keys: where a key ends in a name.

    Raises:
        UserError: the tar cannot be opened, or is compressed.
    """
    rules.check_rule(keys)
    found = contents(tar)
    groups = list(rules.grouped(found.members, keys, lambda m: (m.offset, m.bytes)))
    groups = rules.joined(groups) if found.whole else groups[:-1]
    left_out: Counter[str] = Counter() if found.whole else Counter({CUT: 1})
    kept: dict[str, list[tuple[int, int]]] = {}
    such_as: dict[str, str] = {}
    for group in groups:
        faults = [rules.DOTTED] * group.dotted
        fault = group.fault or (rules.DUPLICATE if group.key in kept else "")
        if not fault:
            kept[group.key] = [group.picture, *(group.members.get(e, (0, 0)) for e in CAPTIONS)]
        elif group.members or not faults:  # dotted names alone are the samples that they contain
            faults.append(fault)
        left_out.update(faults)
        for reason in faults:
            such_as.setdefault(reason, group.first.encode(errors="replace").decode())
    names = [key.encode(errors="surrogateescape") for key in kept]
    return Index(
        tar,
        found.stat.st_size,
        found.stat.st_mtime_ns,
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array(list(kept.values()), np.int64).reshape(-1, 3, 2),
        left_out,
        such_as,
        keys,
    )


def read_through(index: Index) -> Index:
    """Return the index with the tar's digest and the pictures' hashes, which reads the whole tar.

    Raises:
        UserError: the tar cannot be read.
    """
    numbers, most = np.zeros(len(index.ends), np.int64), LIMITS["picture"]
    with explained(f"cannot read {index.tar}"), open(index.tar, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        for row, (offset, size) in enumerate(index.spans[:, 0].tolist()):
            numbers[row] = content_number(os.pread(file.fileno(), min(size, most), offset))
    return replace(index, digest=digest, numbers=numbers)


def save(index: Index) -> None:
    """Write an index next to its tar."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if index.numbers is not None:
        arrays["numbers"] = index.numbers
    about = {
        "bytes": str(index.bytes),
        "mtime_ns": str(index.mtime_ns),
        "left_out": json.dumps(index.left_out),
        "such_as": json.dumps(index.such_as),
        "keys": index.keys,
        "digest": index.digest,
    }
    about["checksum"] = _checksum(arrays, about)
    path = index.tar.with_suffix(".index")
    write_atomically(path, lambda partial: save_file(arrays, partial, about))


def load(tar: Path) -> Index:
    """Read the index of a tar; those of older versions have no digest and no hashes.

    Raises:
        UserError: the index is missing or damaged.
    """
    path = tar.with_suffix(".index")
    try:
        with safe_open(path, framework="np") as file:
            about = dict(file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.pop("checksum") != _checksum(arrays, about):
            raise ValueError("wrong checksum")
        return Index(
            tar,
            int(about["bytes"]),
            int(about["mtime_ns"]),
            *(arrays[name] for name in _ARRAYS),
            left_out=Counter(json.loads(about["left_out"])),
            such_as=json.loads(about.get("such_as", "{}")),
            keys=about.get("keys", FIRST_DOT),
            digest=about.get("digest", ""),
            numbers=arrays.get("numbers"),
        )
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {remedy(tar.parent)}") from error


def check_unchanged(tar: Path, then: Index | Summary) -> int:
    """Check that a tar has not changed since it was indexed; return its modification time.

    A tar with the same size and another time, such as a copy, is compared by digest, if known.

    Raises:
        UserError: its content has changed, or its time has and the digest is unknown.
    """
    with explained(f"cannot read {tar}"):
        stat = tar.stat()
        same = stat.st_size == then.bytes
        if same and stat.st_mtime_ns != then.mtime_ns:
            with open(tar, "rb") as file:
                digest = then.digest and hashlib.file_digest(file, "sha256").hexdigest()
            same = bool(digest) and digest == then.digest
    if not same:
        raise UserError(
            f"{tar} has changed since it was indexed: {remedy(tar.parent)} "
            "(cp -p and rsync -t keep the modification time of a copy)"
        )
    return stat.st_mtime_ns


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, str]) -> str:
    value = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays, key=[*_ARRAYS, "numbers"].index):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, value)
    return f"{value:08x}"
