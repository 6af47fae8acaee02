"""Reads users' text files: their encodings and line ends.

A file of uncertain encoding is refused, and never read with replacement characters. A line ends at
a line feed only, because prompts may contain other separators, which would split them.
"""

import re
from pathlib import Path
from typing import Any

from cascade.errors import UserError, explained

# Byte order marks. UTF-32 first, as its little-endian mark begins with that of UTF-16.
_MARKS = {
    b"\xff\xfe\0\0": None,
    b"\0\0\xfe\xff": None,
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}

# ASCII, and the letters and common punctuation of CP1252.
_WESTERN = re.compile(rb"[\0-\x7f\x80\x85\x8c\x91-\x97\x9c\xa0-\xff]*")


class BadText(ValueError):
    """Bytes that are not text in a supported encoding. The message guesses theirs, and names iconv.

    Attributes:
        start: offset of the first byte that does not fit.
    """

    def __init__(self, message: str, start: int = 0):
        super().__init__(message)
        self.start = start


def decoded(data: bytes) -> str:
    """Decodes UTF-8 with or without a byte order mark, or UTF-16 with one, and removes the mark.

    Raises:
        BadText: the bytes are anything else.
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
    """ "UTF-16LE" or "UTF-16BE" if every other byte is mostly zero, as in Western text; else ""."""
    first, second = data[::2].count(0), data[1::2].count(0)
    if 4 * max(first, second) < len(data) or 8 * min(first, second) > max(first, second):
        return ""
    return ("UTF-16BE" if first > second else "UTF-16LE") if data else ""


def _eight_bit(data: bytes) -> str:
    """Guesses an 8-bit encoding: non-ASCII bytes are isolated in Western text, else in runs."""
    rest = [c for c in data.decode(errors="replace") if c > "\x7f"]
    if len(rest) > 2 * rest.count("\ufffd"):
        return "UTF-8 with a damaged character: mend it, or copy it again"
    if _WESTERN.fullmatch(data) and not re.search(rb"[\x80-\xff]{3}", data):
        return _converted("CP1252")
    return _converted("GB18030, SHIFT_JIS or CP1251, by its language", "ENCODING")


def _converted(guess: str, name: str | None = None) -> str:
    return f"not UTF-8, perhaps {guess}: convert it with iconv -f {name or guess} -t UTF-8"


def read(path: Path) -> str:
    """Reads a user's text file.

    Raises:
        UserError: the file cannot be opened, or its encoding is unknown (with the line number).
    """
    with explained(f"cannot read {path}"):
        data = path.read_bytes()
    try:
        text = decoded(data)
    except BadText as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: {error}") from error
    if "\r" in text and "\n" not in text:
        raise UserError(
            f"{path}: its lines end in carriage returns alone: convert it with tr '\\r' '\\n'"
        )
    return text


def lines(text: str) -> list[str]:
    """Splits a text at line feeds, and removes a carriage return before each."""
    *ended, rest = text.split("\n")
    found = [line.removesuffix("\r") for line in ended]
    return [*found, rest] if rest else found


def one_line(text: Any) -> str:
    """Collapses white space in a caption to single spaces; returns "" if it is not a string."""
    return encodable(" ".join(text.split())) if isinstance(text, str) else ""


def encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON can hold but no encoding can, by "?"."""
    return text.encode(errors="replace").decode()


def brief(text: Any, longest: int = 60) -> str:
    """Quotes content of a user's file for a message: escaped to one line, and shortened."""
    shown = repr(str(text)[: longest + 1])[1:-1]
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
