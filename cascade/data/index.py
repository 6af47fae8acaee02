"""Which samples a tar holds and where: one pass over its headers, and no sample is read.

A sample is a run of neighbouring members with one key, the name up to the first dot of its base
name (the WebDataset convention); extensions are lower-cased, and empty members count as missing.
"""

import glob
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from cascade.errors import UserError

log = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp")

Paths = str | Path | Sequence[str | Path]


class Entry(NamedTuple):
    """Where one sample lies: its tar, its key, and (offset, bytes) by extension."""

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        """The bytes of a member, b"" if the sample has no such."""
        offset, size = self.members.get(extension, (0, 0))
        with open(self.shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    @property
    def picture(self) -> str | None:
        """The extension of the picture, None if there is none."""
        return next((extension for extension in PICTURES if extension in self.members), None)


def samples(path: Paths, split: str, captions: Set[str]) -> tuple[list[Entry], Counter[str]]:
    """All usable samples of the tars of a split, and how many were left out by reason.

    Args:
        path: a folder, a glob, or a list of tars.
        split: only tars called `{split}-*`; all, if no name carries a split or a list has no such.
        captions: extensions that may caption a sample: of "txt" and "json".

    Raises:
        UserError: no tars, one that cannot be opened, or no usable sample in them.
    """
    entries, skipped = [], Counter()
    for tar in tars(path, split):
        found, reasons = index(tar, captions)
        entries += found
        skipped += reasons
    if not entries:
        raise UserError(
            f"{path} has no usable sample ({counted(skipped)}): a sample is a picture "
            f"({', '.join(PICTURES)}) and a caption ({', '.join(sorted(captions))}) side by side"
        )
    if skipped:
        log.warning("%s: samples left out: %s", path, counted(skipped))
    return entries, skipped


def counted(reasons: Counter[str]) -> str:
    """ "3 no caption, 1 no picture"; "none" of nothing."""
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "none"


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


def index(tar: Path, captions: Set[str]) -> tuple[list[Entry], Counter[str]]:
    """The usable samples of a tar, and how many were left out by reason.

    Of samples with equal keys the first usable one counts. The last sample of a tar that was cut
    short is left out: nobody can say whether it is whole.

    Raises:
        UserError: the tar cannot be opened.
    """
    groups, whole = _groups(tar)
    skipped = Counter()
    if not whole:
        groups = groups[:-1]
        skipped["cut short"] += 1
        log.warning("%s is cut short after %d samples: fetch or write it again", tar, len(groups))
    entries = {}
    for entry in groups:
        if not entry.picture:
            skipped["no picture"] += 1
        elif not entry.members.keys() & captions:
            skipped["no caption"] += 1
        elif entry.key in entries:
            skipped["duplicate key"] += 1
        else:
            entries[entry.key] = entry
    return list(entries.values()), skipped


def _groups(tar: Path) -> tuple[list[Entry], bool]:
    """All runs of members with one key, and whether the tar has its end."""
    groups, end = [], 0
    try:
        with open(tar, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        end = member.offset_data + -(-member.size // 512) * 512
                        _append(groups, tar, member)
            except (tarfile.TarError, ValueError):
                return groups, False
            # tarfile takes a damaged header for the end, but the end is a block of zeros.
            file.seek(end)
            return groups, file.read(512) == bytes(512)
    except OSError as error:
        raise UserError(f"cannot read {tar}: {os.strerror(error.errno or 0)}") from error


def _append(groups: list[Entry], tar: Path, member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or not member.isreg():
        return
    key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
    if not groups or groups[-1].key != key or extension in groups[-1].members:
        groups.append(Entry(tar, key, {}))
    if member.size:
        groups[-1].members[extension] = (member.offset_data, member.size)
