"""Checks the values of a configuration against the annotations of its parameters.

YAML and Hydra guess the type of a value, and each differently: `no` is a text to one and a bool to
the other. So a value of another type than its parameter's is refused, unless it can only be read in
one way: 2e3 for a whole number, and `inf`.
"""

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from cascade.config.signatures import ANYTHING, Type, parameters
from cascade.errors import UserError

_INFINITE = {"inf": math.inf, ".inf": math.inf, "+inf": math.inf, "+.inf": math.inf}
_SWITCHES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def conform(node: DictConfig | ListConfig, of: Type, where: str = "") -> None:
    """Converts the values of a resolved configuration to the types of their parameters, in place.

    Raises:
        UserError: a value that its parameter does not take; the message says what to write.
    """
    children = list(_children(node, of))
    # Plain values first, so that the message names the key that was written.
    for key, wanted in children:
        if not isinstance(node[key], DictConfig | ListConfig):
            node[key] = _value(node[key], wanted, _place(where, key))
    for key, wanted in children:
        if isinstance(value := node[key], DictConfig | ListConfig):
            if not _may_hold(wanted, value):
                raise UserError(refusal(_place(where, key), value, wanted))
            conform(value, wanted, _place(where, key))


def type_at(tree: DictConfig, of: Type, path: str) -> Type:
    """The type expected at a dotted key of a composed configuration, which need not have it yet."""
    head, _, rest = path.partition(".")
    wanted = dict(_children(tree, of, head)).get(_key(tree, head), ANYTHING)
    if not rest:
        return wanted
    inner = tree.get(_key(tree, head)) if head in tree or isinstance(tree, ListConfig) else None
    return type_at(inner, wanted, rest) if isinstance(inner, DictConfig | ListConfig) else ANYTHING


def _key(node: DictConfig | ListConfig, head: str) -> str | int:
    return int(head) if isinstance(node, ListConfig) and head.isdigit() else head


def _place(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _children(
    node: DictConfig | ListConfig, of: Type, *more: str
) -> Iterator[tuple[str | int, Type]]:
    """Yields each key of a node, and further ones, with the type expected there."""
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            items = of.items or (ANYTHING,)
            yield i, items[min(i, len(items) - 1)]
        return
    target = node.get("_target_") or of.fields
    known = parameters(str(target)) if target else {}
    for key in dict.fromkeys([*node, *more]):
        yield key, known.get(key, ANYTHING) if target else of.values or ANYTHING


def _may_hold(wanted: Type, value: DictConfig | ListConfig) -> bool:
    if not wanted.plain - {"None"}:
        return True
    if isinstance(value, ListConfig):
        return wanted.items is not None
    return "_target_" in value or wanted.fields is not None or wanted.values is not None


def _value(value: Any, wanted: Type, where: str) -> Any:
    plain = wanted.plain
    if wanted.anything or (not plain and not wanted.items):
        return value
    if isinstance(value, str) and "float" in plain and "str" not in plain:
        value = _INFINITE.get(value.lower(), value)
    if isinstance(value, float) and not math.isfinite(value):
        if (word := str(value)) not in wanted.more:
            known = " or ".join(["a finite number", *(["null"] if "None" in plain else [])])
            raise UserError(f"{where}={word}: give {known}")
        return value
    if type(value).__name__.replace("NoneType", "None") in plain:
        return value
    if type(value) is int and "float" in plain:
        return value
    if isinstance(value, float) and "int" in plain and value.is_integer():
        return int(value)
    if type(value) is int and "bool" in plain and value in (0, 1):
        return bool(value)
    raise UserError(refusal(where, value, wanted))


def refusal(where: str, value: Any, wanted: Type) -> str:
    """The message that refuses a value, with an example of the type that is expected."""
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
    if "bool" in wanted.plain and (word := _SWITCHES.get(str(value).lower())):
        return f"{where}={shown}: write {word}"
    if "str" in wanted.plain and isinstance(value, int | float):
        return f"{where}={shown}: put it into quotes, or it is read as something else"
    kinds = [what for kind, what in _WORDS.items() if kind in wanted.plain]
    if "float" in wanted.plain and "int" in wanted.plain:
        kinds.remove(_WORDS["int"])
    kinds += [_listed(wanted.items)] if wanted.items else []
    kinds += ["names with values, as {a: 1}"] if wanted.values or wanted.fields else []
    kinds += ["null"] if "None" in wanted.plain else []
    return f"{where}={shown}: give {' or '.join(kinds) or 'something else'}"


def _listed(items: tuple[Type, ...]) -> str:
    """How to write a list of this type."""
    one = next((word for word in ("int", "float", "str") if word in items[0].plain), None)
    word = {"int": "1", "float": "0.5", "str": "'a'"}.get(one, "...")
    return f"a list of {len(items)}" if len(items) > 1 else f"a list, as [{word}]"
