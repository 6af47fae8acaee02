"""Which samples are trained on, and which are held out: by the names of tars, or by pictures.

A tar belongs to the split whose name is in its own (`train-00000`, `cc3m-validation-0001`). Where
no name says what is held out, `cascade data index --val` holds out a share of the pictures: by a
number that is a function of a picture's bytes, so that copies of one stay on one side and every
command means the same samples. Nothing else is held out.
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
_BITS = 48  # of the number of a picture: its share of their range is a float64, exactly


class NothingHeldOut(UserError):
    """Nothing is held out, neither by the names of tars nor by an index."""


def split_of(name: str) -> str | None:
    """The split that the name of a tar says: the first of its words that is one."""
    words = re.findall("[a-z]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def canonical(split: str) -> str:
    """`val` for "validation"; what is unknown is what somebody called their tars."""
    return _WORDS.get(split, split)


def of_split(names: Sequence[str], split: str, listed: bool = False) -> list[str]:
    """The names of a split's tars: those called `{split}-*`, or else with such a word.

    If no name has a word for a split, and all begin alike, all are for training.

    Args:
        listed: whether somebody listed them one by one: whatever their names, for training.
    """
    if split == ALL:
        return list(names)
    if begins := [name for name in names if name.startswith(f"{split}-")]:
        return begins
    said = {name: split_of(name) for name in names}
    if chosen := [name for name in names if said[name] == canonical(split)]:
        return chosen
    alike = not any(said.values()) and len(set(map(_prefix, names))) == 1
    return list(names) if canonical(split) == TRAIN and (listed or alike) else []


def is_divided(name: str) -> bool:
    """Whether an index holds pictures of a tar out: those that no name holds out already."""
    return split_of(name) in (None, TRAIN)


def chosen(shares: Mapping[str, float], split: str, listed: bool = False) -> tuple[list[str], str]:
    """The names of a split's tars, and which part of their samples belongs to it.

    Args:
        shares: by name of a tar, how large a share of its pictures is held out.
        listed: see `of_split`.

    Returns:
        The part is "train" (without what is held out), "val" (that alone) or "all".
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
    """What to say where `chosen` found none of the tars that are there."""
    said = {split_of(name) for name in names} - {None}
    known = sorted(said or (set(map(_prefix, names)) - {""} if split == TRAIN else ()))
    choose = f"choose a split of {known}, or" if known else "choose"
    what = f"{where} has no {split}-*.tar: {choose} the split all, which is everything"
    if canonical(split) != HELD_OUT:
        return UserError(what)
    return NothingHeldOut(f"{what}; `cascade data index DIR --val 1%` holds some pictures out")


def described(split: str) -> str:
    """What captions of a split are, in words."""
    kind = canonical(split)
    if kind == ALL:
        return "captions of all samples, those of the training among them"
    if kind == TRAIN:
        return "captions of the training samples"
    return "held-out captions" if kind in _WORDS.values() else f"captions of the split {split}"


def _prefix(name: str) -> str:
    """The word before a dash that a name begins with, but for a number at its end."""
    match = re.match(r"([a-zA-Z]\w*?)\d*-", name)
    return match[1] if match else ""


def content_number(data: bytes) -> int:
    """A number of a picture's bytes, uniform below 2^48: the first bits of their SHA-256."""
    return int.from_bytes(hashlib.sha256(data).digest()[: _BITS // 8])


def is_held_out(numbers: Int64[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Whether each of these pictures is, if so large a share is."""
    return numbers < share * 2**_BITS


def share_or_count(text: str) -> float | int:
    """ "1%" or "0.01" as a share, "500" as a count. ValueError if it is neither."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if "." in text else int(text)


def share_of(asked: str, numbers: Int64[np.ndarray, " n"]) -> float:
    """The share of pictures to hold out; of "500" that which leaves out the 500 lowest numbers.

    Copies are never divided, and so it may be some fewer.

    Raises:
        UserError: it is no number or share, or holds out nothing or everything.
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
