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
from typing import Any

import numpy as np

from cascade.data.tars import index as indexes
from cascade.data.tars.index import Summary, load, remedy, save, scan
from cascade.data.tars.keys import FIRST_DOT, check_rule
from cascade.data.tars.splits import HELD_OUT, is_divided, share_of, split_of
from cascade.data.tars.tar import Paths, listed, tars_of
from cascade.errors import UserError, explained
from cascade.files.stores import places
from cascade.files.stores.places import Place, Remote, Stat, place

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
    folder: Place,
    progress: Callable[[int, int], None],
    keys: str | None = None,
    val: str | None = None,
    out: Place | None = None,
) -> tuple[Dataset, list[str]]:
    """Index the tars of a folder, one at a time, and write `dataset.json`.

    Each tar is read once. Tars with a valid index are skipped, so that an interrupted call can be
    repeated; indexes of older versions are updated.

    Args:
        progress: called with (tars done, tars in all).
        keys: where a key ends in a name; None keeps the folder's rule, at first the first dot.
        val: the share or number of pictures to hold out (`splits.share_of`); None keeps it.
        out: another folder to write to.

    Returns:
        What was written, and the errors of the tars that cannot be read.

    Raises:
        UserError: no tars, the folder cannot be written to, or `val` cannot be held out.
    """
    out = out or folder
    paths, before = tars_of(folder), _before(out)
    if not paths:
        raise UserError(f"{folder}: no .tar is there; give the folder of the shards")
    keys = keys or before.keys
    check_rule(keys)
    if val is not None and any(split_of(path.stem) == HELD_OUT for path in paths):
        raise UserError(f"{folder} has tars that are held out by name: omit --val")
    read, unreadable = [], []
    with explained(f"cannot write to {out}"):
        for n, tar in enumerate(paths):
            try:
                read.append(_indexed(tar, keys, out))
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
        _write(found, out)
    return found, unreadable


def _before(folder: Place) -> Dataset:
    try:
        return read_dataset(folder) or Dataset({})
    except UserError:  # damaged: only its options are lost
        return Dataset({})


def _indexed(tar: Place, keys: str, out: Place) -> indexes.Index:
    with suppress(UserError):
        index = load(tar, out)
        if index.keys == keys and index.digest and index.sides is not None:
            now = indexes.check_unchanged(tar, index)
            if now.mtime_ns != index.mtime_ns or now.version != index.version:
                index = replace(index, mtime_ns=now.mtime_ns, version=now.version)
                save(index, out)
            return index
    index = indexes.read_through(scan(tar, keys))
    save(index, out)
    return index


def renew(folder: Place, dataset: Dataset, stats: Mapping[str, Stat]) -> None:
    """Write new modification times and versions of some tars, if possible."""
    new = {name: {"mtime_ns": s.mtime_ns, "version": s.version} for name, s in stats.items()}
    tars = {name: replace(dataset.tars[name], **about) for name, about in new.items()}
    with suppress(OSError, UserError):  # read-only folders: tars are hashed again at each start
        for name, about in new.items():
            save(replace(load(folder / name), **about), folder)
        _write(replace(dataset, tars=dataset.tars | tars), folder)


def _write(dataset: Dataset, folder: Place) -> None:
    totals = asdict(total(dataset.tars.values()))
    for of_one in ("mtime_ns", "digest", "version"):
        del totals[of_one]
    found = {
        "totals": {"tars": len(dataset.tars), **totals},
        "keys": dataset.keys,
        "held_out": dataset.held_out,
        "tars": {name: _noted(summary) for name, summary in dataset.tars.items()},
    }
    places.write_text(folder / DATASET, json.dumps(found, indent=1) + "\n")


def _noted(summary: Summary) -> dict[str, Any]:
    """Return a summary's fields; on a disk as earlier versions read them, without an ETag."""
    return {k: v for k, v in asdict(summary).items() if k != "version" or v}


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


def tars_in(path: Paths, index: Place | None) -> list[Place]:
    """Return the tars of a folder, a glob or a list (`listed`).

    A web server lists nothing: the tars of a folder there are those that its index names.
    """
    if isinstance(path, str | Place) and isinstance(folder := place(path), Remote):
        dataset = None if folder.is_listed else read_dataset(index or folder)
        if dataset is not None and places.is_folder(folder):
            return places.in_order(folder / name for name in dataset.tars)
    return listed(path)


def read_dataset(folder: Place) -> Dataset | None:
    """Read the summary of a folder; None if it was not indexed.

    Raises:
        UserError: `dataset.json` is damaged.
    """
    path = folder / DATASET
    try:
        found = json.loads(places.read_bytes(path))
        tars = {name: _summary(numbers) for name, numbers in found["tars"].items()}
        keys, held_out = found.get("keys", FIRST_DOT), float(found.get("held_out", 0))
        check_rule(keys)
        return Dataset(tars, keys, held_out)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged: {remedy(folder)}") from error


def _summary(numbers: Mapping[str, Any]) -> Summary:
    summary = Summary(**numbers)
    words = ("left_out", "such_as", "digest", "held_out", "version")
    plain: Sequence[Any] = [n for name, n in numbers.items() if name not in words]
    if not all(type(n) is int for n in (*plain, *summary.left_out.values())):
        raise TypeError("not a number")
    return summary
