"""The text that users' files hold: which encodings are read, and where a line ends.

A file whose encoding is not certain is refused, never read with replacement characters. A line ends
at a line feed and nowhere else: prompts contain other separators, and would become two.
"""

import re
from pathlib import Path
from typing import Any

from cascade.errors import UserError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    b"\xff\xfe\0\0": None,
    b"\0\0\xfe\xff": None,
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}

# CP1252's letters and usual punctuation, beside ASCII.
_WESTERN = re.compile(rb"[\0-\x7f\x80\x85\x8c\x91-\x97\x9c\xa0-\xff]*")


class BadText(ValueError):
    """Bytes that are not text in a known encoding; the message guesses which one, and names iconv.

    Attributes:
        start: the first byte that does not fit.
    """

    def __init__(self, message: str, start: int = 0):
        super().__init__(message)
        self.start = start


def decoded(data: bytes) -> str:
    """UTF-8 with or without a mark, or UTF-16 with one; the mark is removed.

    Raises:
        BadText: they are anything else.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    if encoding is None:
        raise BadText(_converted("UTF-32"))
    if not mark and (wide := _wide(data)):
        raise BadText(_converted(f"{wide} without a mark", wide))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = len(mark) + error.start
        if encoding != "utf-8":
            raise BadText("damaged UTF-16: save it again as UTF-8", start) from error
        raise BadText(_eight_bit(data), start) from error


def _wide(data: bytes) -> str:
    """UTF-16LE or UTF-16BE, where every other byte is zero as in Western text; or nothing."""
    first, second = data[::2].count(0), data[1::2].count(0)
    if 4 * max(first, second) < len(data) or 8 * min(first, second) > max(first, second):
        return ""
    return ("UTF-16BE" if first > second else "UTF-16LE") if data else ""


def _eight_bit(data: bytes) -> str:
    """What else it may be: Western text has bytes above ASCII singly, other scripts have runs."""
    rest = [c for c in data.decode(errors="replace") if c > "\x7f"]
    if len(rest) > 2 * rest.count("\ufffd"):
        return "UTF-8 with a damaged character: mend it, or copy it again"
    if _WESTERN.fullmatch(data) and not re.search(rb"[\x80-\xff]{3}", data):
        return _converted("CP1252")
    return _converted("GB18030, SHIFT_JIS or CP1251, by its language", "ENCODING")


def _converted(guess: str, name: str | None = None) -> str:
    return f"not UTF-8, perhaps {guess}: convert it with iconv -f {name or guess} -t UTF-8"


def read(path: Path) -> str:
    """The text of a user's file.

    Raises:
        UserError: it cannot be opened, or its encoding is not known; with the line.
    """
    try:
        data = path.read_bytes()
        text = decoded(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except BadText as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: {error}") from error
    if "\r" in text and "\n" not in text:
        raise UserError(
            f"{path}: its lines end in carriage returns alone: convert it with tr '\\r' '\\n'"
        )
    return text


def lines(text: str) -> list[str]:
    """The lines of a text without their ends, a line feed and a carriage return before it."""
    *ended, rest = text.split("\n")
    found = [line.removesuffix("\r") for line in ended]
    return [*found, rest] if rest else found


def one_line(text: Any) -> str:
    """A caption with its white space made single spaces, or "" for what is no text."""
    return encodable(" ".join(text.split())) if isinstance(text, str) else ""


def encodable(text: str) -> str:
    """A text with "?" for halves of surrogate pairs: JSON can hold them, and no encoding can."""
    return text.encode(errors="replace").decode()


def brief(text: Any, longest: int = 60) -> str:
    """What a user's file says, as part of a message: on one line, and not all of it."""
    shown = repr(str(text)[: longest + 1])[1:-1]
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
