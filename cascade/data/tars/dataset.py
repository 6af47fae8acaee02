"""`dataset.json`, the summary that `cascade data index` writes into a folder of tars.

It has the counts of each tar and their totals, the rule for keys, and the share of the pictures
that is held out; the samples themselves are in an index next to each tar. A folder keeps the
options that it was indexed with until others are given.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.tars import index as indexes
from cascade.data.tars.index import Summary, load, remedy, save, scan
from cascade.data.tars.keys import FIRST_DOT, check_rule
from cascade.data.tars.splits import HELD_OUT, is_divided, share_of, split_of
from cascade.data.tars.tar import tars_of
from cascade.errors import UserError, explained
from cascade.files.atomic import write_text

DATASET = "dataset.json"


@dataclass(frozen=True)
class Dataset:
    """The summary of a folder of tars.

    Attributes:
        tars: the summary of each tar, by file name.
        keys: where a key ends in a name.
        held_out: the share of the pictures that is held out of the tars for training.
    """

    tars: dict[str, Summary]
    keys: str = FIRST_DOT
    held_out: float = 0.0

    def share(self, tar: str) -> float:
        """Return the share of the pictures that is held out of a tar, given its name."""
        return self.held_out if is_divided(tar) else 0.0


def index_folder(
    folder: Path,
    progress: Callable[[int, int], None],
    keys: str | None = None,
    val: str | None = None,
) -> tuple[Dataset, list[str]]:
    """Index the tars of a folder, one at a time, and write `dataset.json`.

    Each tar is read once. Tars with a valid index are skipped, so that an interrupted call can be
    repeated; indexes of older versions are updated.

    Args:
        progress: called with (tars done, tars in all).
        keys: where a key ends in a name; None keeps the folder's rule, at first the first dot.
        val: the share or number of pictures to hold out (`splits.share_of`); None keeps it.

    Returns:
        What was written, and the errors of the tars that cannot be read.

    Raises:
        UserError: no tars, the folder cannot be written to, or `val` cannot be held out.
    """
    paths, before = tars_of(folder), _before(folder)
    if not paths:
        raise UserError(f"{folder}: no .tar is there; give the folder of the shards")
    keys = keys or before.keys
    check_rule(keys)
    if val is not None and any(split_of(path.stem) == HELD_OUT for path in paths):
        raise UserError(f"{folder} has tars that are held out by name: omit --val")
    read, unreadable = [], []
    with explained(f"cannot write to {folder}"):
        for n, tar in enumerate(paths):
            try:
                read.append(_indexed(tar, keys))
            except UserError as error:
                unreadable.append(str(error))
            progress(n + 1, len(paths))
        numbers = [index.numbers for index in read if is_divided(index.tar.stem)]
        share = before.held_out
        if val is not None:
            share = share_of(val, np.concatenate([np.zeros(0, np.int64), *numbers]))
        chosen = Dataset({}, keys, share)
        summaries = {i.tar.name: i.summary(chosen.share(i.tar.stem)) for i in read}
        found = replace(chosen, tars=summaries)
        _write(found, folder)
    return found, unreadable


def _before(folder: Path) -> Dataset:
    try:
        return read_dataset(folder) or Dataset({})
    except UserError:  # damaged: only its options are lost
        return Dataset({})


def _indexed(tar: Path, keys: str) -> indexes.Index:
    with suppress(UserError):
        index = load(tar)
        if index.keys == keys and index.digest:
            now = indexes.check_unchanged(tar, index)
            if now != index.mtime_ns:
                index = replace(index, mtime_ns=now)
                save(index)
            return index
    index = indexes.read_through(scan(tar, keys))
    save(index)
    return index


def renew(folder: Path, dataset: Dataset, times: Mapping[str, int]) -> None:
    """Write new modification times of some tars, if possible."""
    tars = {name: replace(dataset.tars[name], mtime_ns=time) for name, time in times.items()}
    with suppress(OSError, UserError):  # read-only folders: tars are hashed again at each start
        for name, time in times.items():
            save(replace(load(folder / name), mtime_ns=time))
        _write(replace(dataset, tars=dataset.tars | tars), folder)


def _write(dataset: Dataset, folder: Path) -> None:
    totals = asdict(total(dataset.tars.values()))
    for of_one in ("mtime_ns", "digest"):
        del totals[of_one]
    found = {
        "totals": {"tars": len(dataset.tars), **totals},
        "keys": dataset.keys,
        "held_out": dataset.held_out,
        "tars": {name: asdict(summary) for name, summary in dataset.tars.items()},
    }
    write_text(folder / DATASET, json.dumps(found, indent=1) + "\n")


def total(summaries: Iterable[Summary]) -> Summary:
    """Add summaries up; the time is the latest, and the first sample left out is named."""
    rows = list(summaries)
    left_out = sum((Counter(row.left_out) for row in rows), Counter())
    held_out = sum((Counter(row.held_out) for row in rows), Counter())
    such_as = {reason: name for row in reversed(rows) for reason, name in row.such_as.items()}
    sums = (sum(getattr(row, name) for row in rows) for name in ("samples", "txt", "json"))
    latest = max((row.mtime_ns for row in rows), default=0)
    size = sum(row.bytes for row in rows)
    return Summary(size, latest, *sums, dict(left_out), such_as, held_out=dict(held_out))


def read_dataset(folder: Path) -> Dataset | None:
    """Read the summary of a folder; None if it was not indexed.

    Raises:
        UserError: `dataset.json` is damaged.
    """
    path = folder / DATASET
    try:
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        tars = {name: _summary(numbers) for name, numbers in found["tars"].items()}
        keys, held_out = found.get("keys", FIRST_DOT), float(found.get("held_out", 0))
        check_rule(keys)
        return Dataset(tars, keys, held_out)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged: {remedy(folder)}") from error


def _summary(numbers: Mapping[str, Any]) -> Summary:
    summary = Summary(**numbers)
    words = ("left_out", "such_as", "digest", "held_out")
    plain: Sequence[Any] = [n for name, n in numbers.items() if name not in words]
    if not all(type(n) is int for n in (*plain, *summary.left_out.values())):
        raise TypeError("not a number")
    return summary
