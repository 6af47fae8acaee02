"""`dataset.json`, which `cascade data index` writes into a folder of tars: what all of them hold.

It has the numbers of each tar and the totals, where keys end, and what share of the pictures is
held out; the samples themselves are in the indexes beside the tars. What a folder was indexed with
stays until another value is given.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.index import Index, Summary, check_unchanged, load, read_through, save, scan
from cascade.data.keys import FIRST_DOT, check_rule
from cascade.data.splits import HELD_OUT, is_divided, share_of, split_of
from cascade.data.tar import tars_of
from cascade.errors import UserError
from cascade.files import write_atomically

DATASET = "dataset.json"


@dataclass(frozen=True)
class Dataset:
    """What the index of a folder says.

    Attributes:
        tars: the summary of each, by file name.
        keys: where a key ends in a name.
        held_out: the share of the pictures of all tars for training that is held out.
    """

    tars: dict[str, Summary]
    keys: str = FIRST_DOT
    held_out: float = 0.0

    def share(self, tar: str) -> float:
        """How large a share of the pictures of a tar, by its name, is held out."""
        return self.held_out if is_divided(tar) else 0.0


def remedy(folder: Path) -> str:
    return f"run `cascade data index {folder}`"


def index_folder(
    folder: Path,
    progress: Callable[[int, int], None],
    keys: str | None = None,
    val: str | None = None,
) -> tuple[Dataset, list[str]]:
    """Indexes the tars of a folder, one at a time, and writes `dataset.json`.

    Each tar is read once; those with a valid index are passed over, so that an interrupted call
    goes on, and indexes of older versions are brought up to date.

    Args:
        progress: called with (tars done, tars in all).
        keys: where a key ends in a name; None: as before, at the first dot at first.
        val: which share or number of the pictures is held out (`splits.share_of`); None: as before.

    Returns:
        What was written, and what is wrong with the tars that cannot be read.

    Raises:
        UserError: no tars, the folder cannot be written to, or nothing can be held out so.
    """
    paths, before = tars_of(folder), _before(folder)
    if not paths:
        raise UserError(f"{folder}: no .tar is there; give the folder of the shards")
    keys = keys or before.keys
    check_rule(keys)
    if val is not None and any(split_of(path.stem) == HELD_OUT for path in paths):
        raise UserError(f"{folder} has tars that are held out by name: leave --val out")
    read, unreadable = [], []
    try:
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
        summaries = {i.tar.name: i.divided(chosen.share(i.tar.stem)) for i in read}
        found = replace(chosen, tars=summaries)
        _write(found, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {os.strerror(error.errno or 0)}") from error
    return found, unreadable


def _before(folder: Path) -> Dataset:
    try:
        return read_dataset(folder) or Dataset({})
    except UserError:  # damaged: all but what was chosen is found again
        return Dataset({})


def _indexed(tar: Path, keys: str) -> Index:
    try:
        index = load(tar)
        if index.keys == keys and index.digest:
            now = check_unchanged(tar, index)
            if now != index.mtime_ns:
                index = replace(index, mtime_ns=now)
                save(index)
            return index
    except UserError:
        pass
    index = read_through(scan(tar, keys))
    save(index)
    return index


def renewed(folder: Path, dataset: Dataset, times: Mapping[str, int]) -> Dataset:
    """The index of a folder with other times of some tars, by name; written, if that may be."""
    tars = dict(dataset.tars)
    for name, time in times.items():
        tars[name] = replace(tars[name], mtime_ns=time)
    found = replace(dataset, tars=tars)
    try:
        for name, time in times.items():
            save(replace(load(folder / name), mtime_ns=time))
        _write(found, folder)
    except (OSError, UserError):  # of somebody else's: it is read again at the next start
        pass
    return found


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
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(folder / DATASET, lambda beside: beside.write_text(text))


def total(summaries: Iterable[Summary]) -> Summary:
    """The sums; the time is the latest, and of what was left out the first is named."""
    rows = list(summaries)
    left_out = sum((Counter(row.left_out) for row in rows), Counter())
    held_out = sum((Counter(row.held_out) for row in rows), Counter())
    such_as = {reason: name for row in reversed(rows) for reason, name in row.such_as.items()}
    sums = (sum(getattr(row, name) for row in rows) for name in ("samples", "txt", "json"))
    latest = max((row.mtime_ns for row in rows), default=0)
    size = sum(row.bytes for row in rows)
    return Summary(size, latest, *sums, dict(left_out), such_as, held_out=dict(held_out))


def read_dataset(folder: Path) -> Dataset | None:
    """What the index of a folder says; None if it was not indexed.

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
