"""Divides samples into splits: by the names of tars, or by a hash of each picture.

A tar belongs to the split that its name contains (`train-00000`, `cc3m-validation-0001`). If no
name indicates held-out data, `cascade data index --val` can hold out a fraction of the pictures,
selected by a hash of their bytes: copies of a picture stay in one split, and all commands agree.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from cascade.errors import UserError

TRAIN, HELD_OUT, ALL = "train", "val", "all"

_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "heldout", "holdout"), HELD_OUT),
    **dict.fromkeys(("test", "testing"), "test"),
    "unseen": "unseen",
}
_BITS = 48  # of a picture's hash: few enough for float64 to compare exactly


class NothingHeldOut(UserError):
    """Neither the names of tars nor an index hold anything out."""


def split_of(name: str) -> str | None:
    """Return the split that a tar's name contains: its first word that is one; None without."""
    words = re.findall("[a-z]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def canonical(split: str) -> str:
    """Return `val` for "validation" and the like; unknown splits may be prefixes of tars' names."""
    return _WORDS.get(split, split)


def of_split(names: Sequence[str], split: str, listed: bool = False) -> list[str]:
    """Return the names of a split's tars: those called `{split}-*`, or else containing the word.

    If no name contains a split and all have the same prefix, all are for training.

    Args:
        listed: the user listed the tars one by one: unless some are named for training, all of
            them are for training, whatever their prefixes.
    """
    if split == ALL:
        return list(names)
    if prefixed := [name for name in names if name.startswith(f"{split}-")]:
        return prefixed
    splits = {name: split_of(name) for name in names}
    if named := [name for name in names if splits[name] == canonical(split)]:
        return named
    alike = not any(splits.values()) and len(set(map(_prefix, names))) == 1
    return list(names) if canonical(split) == TRAIN and (listed or alike) else []


def is_divided(name: str) -> bool:
    """Return whether an index may hold out pictures of a tar: not if its name does already."""
    return split_of(name) in (None, TRAIN)


def chosen(shares: Mapping[str, float], split: str, listed: bool = False) -> tuple[list[str], str]:
    """Return the names of a split's tars, and which part of their samples belongs to it.

    Args:
        shares: the held-out fraction of the pictures of each tar, by name.
        listed: see `of_split`.

    Returns:
        The part is "train" (not held out), "val" (held out) or "all".
    """
    names = of_split(list(shares), split, listed)
    if split == ALL or canonical(split) in {*_WORDS.values()} - {TRAIN, HELD_OUT}:
        return names, ALL
    if canonical(split) != HELD_OUT:
        return names, TRAIN
    if names:
        return names, ALL
    return [name for name, share in shares.items() if share], HELD_OUT


def lacking(where: object, names: Sequence[str], split: str) -> UserError:
    """Return the error for a split of which `chosen` found no tars."""
    splits = {split_of(name) for name in names} - {None}
    known = sorted(splits or (set(map(_prefix, names)) - {""} if split == TRAIN else ()))
    choose = f"choose a split of {known}, or" if known else "choose"
    what = f"{where} has no {split}-*.tar: {choose} the split all, which is everything"
    if canonical(split) != HELD_OUT:
        return UserError(what)
    return NothingHeldOut(f"{what}; `cascade data index DIR --val 1%` holds some pictures out")


def described(split: str) -> str:
    """Describe the captions of a split."""
    kind = canonical(split)
    if kind == ALL:
        return "captions of all samples, those of the training among them"
    if kind == TRAIN:
        return "captions of the training samples"
    return "held-out captions" if kind in _WORDS.values() else f"captions of the split {split}"


def _prefix(name: str) -> str:
    """Return the word before a name's first dash, without trailing digits."""
    match = re.match(r"([a-zA-Z]\w*?)\d*-", name)
    return match[1] if match else ""


def content_number(data: bytes) -> int:
    """Return a hash of a picture's bytes, uniform below 2^48: the first bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(data).digest()[: _BITS // 8])


def is_held_out(numbers: Int64[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Return whether each picture is held out, by its hash, if a fraction `share` is."""
    return numbers < share * 2**_BITS


def share_or_count(text: str) -> float | int:
    """Parse "1%" or "0.01" as a share (float), "500" as a count (int). Raises ValueError."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if "." in text else int(text)


def share_of(asked: str, numbers: Int64[np.ndarray, " n"]) -> float:
    """Return the share of pictures to hold out; for "500", that of the 500 lowest hashes.

    Copies of a picture stay together, so it may be a few less.

    Raises:
        UserError: not a number or share, or one that holds out nothing or everything.
    """
    try:
        value = share_or_count(asked)
    except ValueError:
        value = -1
    if isinstance(value, int) and 0 < value < len(numbers):
        value = float(np.sort(numbers)[value]) / 2**_BITS
    held_out = is_held_out(numbers, value).sum() if isinstance(value, float) else 0
    if not (value == 0 or 0 < held_out < len(numbers)):
        raise UserError(
            f"--val {asked} of {len(numbers):,} samples: give a number of pictures or a share "
            "such as 1% that holds out some and not all, or 0 for none"
        )
    return float(value)
