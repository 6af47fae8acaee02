"""Overrides of the command line: `key=value` in Hydra's grammar, and text where a text is wanted.

Hydra guesses what is written: run=2017 is a number, run=1_000 is 1000, run=a,b is a grid of two and
run=a&b an error. What a parameter takes as text is the text that was typed, if Hydra does not read
one itself: with quotes, escapes or interpolations.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from cascade.errors import UserError
from cascade.verbs.signatures import Type
from cascade.verbs.values import refusal


def assigned(key: str, value: Any) -> str:
    """The override that gives a key this value, whatever is in it.

    Args:
        value: a text or a path, a number, a switch, None, or a list of these.
    """
    return f"{key}={quoted(value)}"


def quoted(value: Any) -> str:
    if isinstance(value, str | Path):
        # OmegaConf halves the backslashes that stand before what would be an interpolation.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
        return QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, Sequence):
        return f"[{','.join(map(quoted, value))}]"
    return (
        "null" if value is None else repr(value).lower() if isinstance(value, bool) else repr(value)
    )


@dataclass(frozen=True)
class Given:
    """One override, as it was typed.

    Args:
        key: with Hydra's signs before it.
        text: behind the equals sign; None: there is none, so that Hydra has to say what is wrong.
        value: as Hydra reads it.
        readable: whether Hydra reads one value.
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
        """What can be composed in order to see what is wanted."""
        return self.whole if self.readable or self.text is None else assigned(self.key, self.text)

    def meant(self, wanted: Type) -> str:
        """What is to be composed where this type is wanted.

        Raises:
            UserError: it cannot be read, and is not a text.
        """
        if self.text is None or self.key.startswith("~"):
            return self.whole
        if wanted.items and (inner := _inner(self.text)) is not None:
            if "str" in wanted.items[0].plain and not _texts(self):
                return f"{self.key}=[{','.join(map(_as_text, inner))}]"
        elif "str" in wanted.plain and not self._kept(wanted):
            return assigned(self.key, self.text)
        if self.readable:
            return self.whole
        if wanted.plain or wanted.items or wanted.values:
            raise UserError(refusal(self.path, self.text, wanted))
        raise UserError(
            f"{self.whole}: some of its characters have a meaning in Hydra's grammar: put what is "
            f"""a text into quotes, as '{self.key}="..."', and a list into brackets"""
        )

    def _kept(self, wanted: Type) -> bool:
        """Whether what Hydra reads is what is wanted."""
        kind = type(self.value).__name__.replace("NoneType", "None")
        return self.readable and kind in wanted.plain


def read(override: str) -> Given:
    found = re.fullmatch(r"((?:\+\+|\+|~)?[^=]+)=(.*)", override, re.S)
    if not found:
        return Given(override, override, None, None, True)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return Given(override, found[1], found[2], None, False)
    return Given(override, found[1], found[2], _value(parsed), not parsed.is_sweep_override())


def _value(parsed: Override) -> Any:
    value = None if parsed.is_sweep_override() else parsed.value()
    return str(value) if isinstance(value, QuotedString) else value


def _texts(given: Given) -> bool:
    """Whether Hydra reads a list of texts."""
    return given.readable and all(isinstance(one, str) for one in given.value)


def _as_text(item: str) -> str:
    return item if item[:1] in ("'", '"') else quoted(item)


def _inner(text: str) -> list[str] | None:
    """The items of a list in brackets, as they are typed; None: it is no such list."""
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
