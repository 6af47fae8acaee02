"""Finds the samples of a tar in one pass over its headers, without reading any sample.

The result can be stored next to the tar, in `{shard}.index` (safetensors, with a checksum); it
does not depend on which captions are used. A stored index also has what takes reading all bytes: a
digest of the tar, which identifies it after it was moved or renamed, a hash of each picture, by
which pictures are held out (`cascade.data.tars.splits`), and the sides of each picture, by which it
belongs to an aspect-ratio bucket (`cascade.buckets`).
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save_file

from cascade.data.items import stated_orientation
from cascade.data.tars import keys as rules
from cascade.data.tars.keys import CAPTIONS, FIRST_DOT
from cascade.data.tars.splits import ALL, HELD_OUT, content_number, is_held_out
from cascade.data.tars.tar import SWALLOWED, contains_members, contents, filled
from cascade.errors import UserError, explained
from cascade.files.stores import places
from cascade.files.stores.places import Place, Remote, Stat
from cascade.files.stores.reading import as_file, opened
from cascade.formats.rgb import BadSample, sides

MEMBERS = ("picture", *CAPTIONS)
CUT = "cut short"

# Tars are not trusted: longer members are bad samples, and are never read.
LIMITS = {"picture": 2**26, "txt": 2**20, "json": 2**20}  # bytes

_ARRAYS = ("names", "ends", "spans")
_FURTHER = ("numbers", "sides")  # which not all indexes have


@dataclass(frozen=True)
class Summary:
    """The counts of one tar: its size, modification time, samples, and those left out by reason.

    Attributes:
        samples: how many have a picture and a caption (a `txt` or a `json`).
        txt, json: how many of these have one.
        such_as: for each reason, a member of a sample that was left out.
        digest: of all its bytes; "" if it was not read.
        held_out: how many of `samples`, `txt` and `json` are held out.
        version: its ETag in a store; "" on a disk.
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
    version: str = ""

    def usable(self, captions: Set[str], part: str = ALL) -> int:
        """Count the samples of a part that have one of these members."""
        of = "samples" if len(captions) > 1 else next(iter(captions))
        whole, held_out = getattr(self, of), self.held_out.get(of, 0)
        return {ALL: whole, HELD_OUT: held_out}.get(part, whole - held_out)


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one tar that have a picture and a caption, in the tar's order.

    Attributes:
        tar: its place; `bytes`, `mtime_ns` and `version` are its size, time and, in a store, ETag
            when it was indexed.
        names, ends: the keys, concatenated in UTF-8, and the end of each.
        spans: offset and size of each sample's picture, txt and json; size 0 if it has none.
        left_out: how many samples were left out, by reason; `such_as` names a member of one.
        keys: where a key ends in a name (`cascade.data.tars.keys`).
        digest: of all its bytes; "" if it was not read.
        numbers: the hash of each picture (`content_number`); None if it was not read.
        sides: height and width of each upright picture, 0 if its header is broken; None if they
            were not read.
    """

    tar: Place
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
    version: str = ""
    sides: Int32[np.ndarray, "n 2"] | None = None

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
        about = dict(self.left_out), dict(self.such_as), self.digest, held_out, self.version
        return Summary(self.bytes, self.mtime_ns, *counts.values(), *about)


def remedy(folder: Place, index: Place | None = None) -> str:
    """Name the command that indexes a folder, into another folder if one is given."""
    return f"run `cascade data index {folder}{f' --index {index}' if index else ''}`"


def counted(reasons: Iterable[str], such_as: Mapping[str, str] | None = None) -> str:
    """Format reasons: "3 no caption (such as a.jpg), 1 no picture"; "none" if empty.

    Args:
        reasons: with duplicates, or a mapping to the number of each.
    """
    named = {reason: f" (such as {name})" for reason, name in (such_as or {}).items()}
    parts = (f"{n} {reason}{named.get(reason, '')}" for reason, n in Counter(reasons).most_common())
    return ", ".join(parts) or "none"


def scan(tar: Place, keys: str = FIRST_DOT) -> Index:
    """Find the samples of a tar by reading its headers.

    Of samples with equal keys, the first counts if all have a picture and a caption; none does if
    a picture or caption belongs to no sample, since another may then have the wrong one. The last
    sample of a truncated tar is left out, since it may be incomplete.

    Args:
        keys: where a key ends in a name.

    Raises:
        UserError: the tar cannot be opened, or is compressed.
    """
    rules.check_rule(keys)
    found = contents(tar)
    groups = list(rules.grouped(found.members, keys, lambda m: (m.offset, m.bytes)))
    groups = rules.joined(groups, found.whole)
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
        found.stat.bytes,
        found.stat.mtime_ns,
        np.frombuffer(b"".join(names), np.uint8),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.array(list(kept.values()), np.int64).reshape(-1, 3, 2),
        left_out,
        such_as,
        keys,
        version=found.stat.version,
    )


def read_through(index: Index) -> Index:
    """Return the index with what takes reading the whole tar: its digest, hashes and sides.

    Members inside others count as left out: a sample may lie whole inside a JSON that nobody reads.

    Raises:
        UserError: the tar cannot be read.
    """
    numbers = np.zeros(len(index.ends), np.int64)
    shapes = np.zeros((len(index.ends), 2), np.int32)
    left_out, such_as = index.left_out.copy(), dict(index.such_as)
    with explained(f"cannot read {index.tar}"):
        ranges = opened(index.tar)
        digest = hashlib.file_digest(as_file(ranges), "sha256").hexdigest()
        for row, spans in enumerate(index.spans.tolist()):
            read = {}
            for member, (offset, size) in zip(MEMBERS, spans, strict=True):
                size = min(size, LIMITS[member])
                blocks = ranges.pread(filled(size), offset)
                read[member] = blocks[:size]
                if contains_members(blocks):
                    left_out[SWALLOWED] += 1
                    such_as.setdefault(SWALLOWED, f"in the {member} of {index.key(row)}")
            numbers[row] = content_number(read["picture"])
            with suppress(BadSample):
                shapes[row] = sides(read["picture"], stated_orientation(read["json"]))
    about = {"left_out": left_out, "such_as": such_as}
    return replace(index, digest=digest, numbers=numbers, sides=shapes, **about)


def save(index: Index, folder: Place | None = None) -> None:
    """Write an index into a folder; None: next to its tar."""
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    further = {name: getattr(index, name) for name in _FURTHER}
    arrays |= {name: array for name, array in further.items() if array is not None}
    about = {
        "bytes": str(index.bytes),
        "mtime_ns": str(index.mtime_ns),
        "left_out": json.dumps(index.left_out),
        "such_as": json.dumps(index.such_as),
        "keys": index.keys,
        "digest": index.digest,
    }
    if index.version:
        about["version"] = index.version
    about["checksum"] = _checksum(arrays, about)
    path = _path(index.tar, folder)
    places.write(path, lambda partial: save_file(arrays, partial, about))


def _path(tar: Place, folder: Place | None) -> Place:
    return (folder or tar.parent) / f"{tar.stem}.index"


def load(tar: Place, folder: Place | None = None) -> Index:
    """Read the index of a tar; those of older versions have no digest, no hashes or no sides.

    Args:
        folder: where it is; None: next to the tar.

    Raises:
        UserError: the index is missing or damaged.
    """
    path = _path(tar, folder)
    try:
        data = places.read_bytes(path)
        arrays = load_arrays(data)
        # The file's header, of which `load_arrays` has found that it is whole.
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
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
            **{name: arrays.get(name) for name in _FURTHER},
            version=about.get("version", ""),
        )
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        again = remedy(tar.parent, folder)
        raise UserError(f"{path} is missing or damaged: {again}") from error


def check_unchanged(tar: Place, then: Index | Summary, folder: Place | None = None) -> Stat:
    """Check that a tar has not changed since it was indexed; return its present `Stat`.

    A tar with the same size and another time, such as a copy, is compared by digest, if known. In
    a store its ETag counts instead of its time, if the index knows it.

    Args:
        folder: of the index, for the message.

    Raises:
        UserError: its content has changed, or its time has and the digest is unknown.
    """
    with explained(f"cannot read {tar}"):
        now = places.stat_of(tar)
        same = now.bytes == then.bytes
        if same and not _as_noted(tar, now, then):
            digest = then.digest and hashlib.file_digest(as_file(opened(tar)), "sha256").hexdigest()
            same = bool(digest) and digest == then.digest
    if not same:
        raise UserError(
            f"{tar} has changed since it was indexed: {remedy(tar.parent, folder)} "
            "(cp -p and rsync -t keep the modification time of a copy)"
        )
    return now


def _as_noted(tar: Place, now: Stat, then: Index | Summary) -> bool:
    if now.version and then.version:
        return now.version == then.version
    # Stores know whole seconds; a web server shows the time of the file that was indexed.
    second = 10**9 if isinstance(tar, Remote) else 1
    return now.mtime_ns // second == then.mtime_ns // second


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, str]) -> str:
    value = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays, key=[*_ARRAYS, *_FURTHER].index):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, value)
    return f"{value:08x}"
