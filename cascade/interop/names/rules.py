"""Renames the tensors of another system to ours, by rules that say how each is changed.

A rule speaks of modules or of single tensors: for "conv", it covers "conv", "conv.weight" and
"conv.bias", whichever there are. "N" in a name stands for a number. What no rule covers is an
error, and so is what a rule needs and does not find.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade.errors import UserError

_SUFFIXES = ("", ".weight", ".bias")


class Rule(NamedTuple):
    """Some foreign tensors, ours that are made of them, and how.

    Attributes:
        theirs, ours: a name, or several.
        change: from as many tensors as `theirs` to as many as `ours`; None: they stay as they are.
    """

    theirs: str | Sequence[str]
    ours: str | Sequence[str]
    change: Callable[..., Any] | None = None


def renamed(
    tensors: Mapping[str, Tensor],
    rules: Iterable[Rule],
    where: object,
    unused: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Our tensors, made of all the foreign ones.

    Args:
        where: the file or folder, for messages.
        unused: patterns of foreign tensors that are left out on purpose, and why.

    Raises:
        UserError: a tensor is missing, or left over.
    """
    found, taken = {}, set()
    for theirs, ours, change in (one for rule in rules for one in _numbered(rule, tensors)):
        sets = [[f"{name}{suffix}" for name in theirs] for suffix in _SUFFIXES]
        there = [names for names in sets if any(name in tensors for name in names)]
        lacking = [name for names in there or sets[1:2] for name in names if name not in tensors]
        if lacking:
            raise UserError(f"{where} lacks {lacking[0]}: give the whole weights")
        for names in there:
            suffix = names[0].removeprefix(theirs[0])
            made = [tensors[name] for name in names]
            made = _several(change(*made)) if change else made
            found |= {f"{name}{suffix}": x for name, x in zip(ours, made, strict=True)}
            taken |= set(names)
    left = [name for name in tensors if name not in taken]
    if odd := [name for name in left if not any(re.fullmatch(p, name) for p in unused or {})]:
        more = f" and {len(odd) - 1} more tensors" if len(odd) > 1 else ""
        raise UserError(f"{where} holds {odd[0]}{more}, which this network has no use for")
    return found


def count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the greatest N for which a tensor begins with the pattern; 0 if none does."""
    numbers = re.compile(re.escape(pattern).replace("N", r"(\d+)") + r"(\.|$)")
    return max((int(m[1]) for m in map(numbers.match, tensors) if m), default=-1) + 1


def by_heads(heads: int, parts: int) -> Callable[[Tensor], Tensor]:
    """Reorders the rows of a joint projection from [head, part, channel] to [part, head, channel].

    OpenAI's networks interleave queries, keys and values by head. A convolution over one position
    becomes a matrix.
    """

    def change(x: Tensor) -> Tensor:
        return matrix(x).unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)

    return change


def matrix(x: Tensor) -> Tensor:
    """The weight of a convolution over one position, as a matrix; a bias stays as it is."""
    return x.flatten(1) if x.ndim > 2 else x


def joined(*parts: Tensor) -> Tensor:
    """Concatenates the rows of several projections."""
    return torch.cat([matrix(part) for part in parts])


def split(*sizes: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Splits the rows of a projection, in these shares."""

    def change(x: Tensor) -> tuple[Tensor, ...]:
        unit = len(x) // sum(sizes)
        return x.split([unit * size for size in sizes])

    return change


def _several(x: Any) -> Sequence[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def _numbered(rule: Rule, tensors: Mapping[str, Tensor]) -> Iterable[Rule]:
    theirs, ours = ([x] if isinstance(x, str) else x for x in rule[:2])
    if "N" not in theirs[0]:
        return [Rule(theirs, ours, rule.change)]
    numbers = range(count(tensors, theirs[0].partition("N")[0] + "N"))
    return [
        Rule(
            [x.replace("N", str(n)) for x in theirs],
            [x.replace("N", str(n)) for x in ours],
            rule.change,
        )
        for n in numbers
    ]
