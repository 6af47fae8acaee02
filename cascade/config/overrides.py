"""Overrides on the command line: `key=value` in Hydra's grammar, but texts need no quotes.

Hydra guesses types: run=2017 is a number, run=1_000 is 1000, run=a,b is a sweep over two values and
run=a&b an error. Where a parameter takes a text, the value is the text as typed, unless Hydra
itself reads a text: one with quotes, escapes or interpolations.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from cascade.config.signatures import Type
from cascade.config.values import refusal
from cascade.errors import UserError


def assigned(key: str, value: Any) -> str:
    """The override that sets a key to a value, whatever characters it contains.

    Args:
        value: a text or a path, a number, a bool, None, or a list of these.
    """
    return f"{key}={quoted(value)}"


def quoted(value: Any) -> str:
    if isinstance(value, str | Path):
        # OmegaConf halves the backslashes before an escaped interpolation.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        return QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, Sequence):
        return f"[{','.join(map(quoted, value))}]"
    return "null" if value is None else repr(value).lower()


@dataclass(frozen=True)
class Given:
    """One override, as it was typed.

    Args:
        key: with Hydra's prefix (+, ++ or ~).
        text: after the equals sign; None: there is none, and Hydra reports the error.
        value: as Hydra parses it.
        readable: whether Hydra parses it to a single value.
    """

    whole: str
    key: str
    text: str | None
    value: Any
    readable: bool

    @property
    def path(self) -> str:
        return self.key.lstrip("+").partition("@")[0].replace("/", ".")

    @property
    def tentative(self) -> str:
        """An override that always composes, so that its parameter's type can be found."""
        return self.whole if self.readable or self.text is None else assigned(self.key, self.text)

    def meant(self, wanted: Type) -> str:
        """The override in Hydra's grammar, given the type of its parameter.

        Raises:
            UserError: Hydra cannot parse it, and the parameter takes no text.
        """
        if self.text is None or self.key.startswith("~"):
            return self.whole
        if wanted.items and (inner := _inner(self.text)) is not None:
            texts = self.readable and all(isinstance(one, str) for one in self.value)
            if "str" in wanted.items[0].plain and not texts:
                items = [one if one[:1] in ("'", '"') else quoted(one) for one in inner]
                return f"{self.key}=[{','.join(items)}]"
        elif "str" in wanted.plain and not self._kept(wanted):
            return assigned(self.key, self.text)
        if self.readable:
            return self.whole
        if wanted.plain or wanted.items or wanted.values:
            raise UserError(refusal(self.path, self.text, wanted))
        raise UserError(
            f"{self.whole}: some of its characters have a meaning in Hydra's grammar: put a text "
            f"""into quotes, as '{self.key}="..."', and a list into brackets"""
        )

    def _kept(self, wanted: Type) -> bool:
        """Whether Hydra's value has a type that the parameter takes."""
        kind = type(self.value).__name__.replace("NoneType", "None")
        return self.readable and kind in wanted.plain


def parse(override: str) -> Given:
    """Parses one override; nothing is raised, as Hydra reports errors when it composes."""
    found = re.fullmatch(r"((?:\+\+|\+|~)?[^=]+)=(.*)", override, re.S)
    if not found:
        return Given(override, override, None, None, True)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return Given(override, found[1], found[2], None, False)
    return Given(override, found[1], found[2], parsed.value(), not parsed.is_sweep_override())


def _inner(text: str) -> list[str] | None:
    """The items of a list in brackets, as typed; None: the text is no such list."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    items, depth, quote = [""], 0, ""
    for letter in text[1:-1]:
        if quote or letter in "'\"":
            quote = "" if quote == letter else quote or letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
    items = [item.strip() for item in items]
    return items if items != [""] else []
