"""What browsers send: texts, numbers, and files within texts. Nothing of it is trusted."""

import binascii
from base64 import b64decode

from cascade.errors import UserError

MOST = 2**53 - 1  # the largest whole number that a browser can count to


def text(value: object) -> str:
    """A text; none is an empty one. Raises UserError if it is something else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{value!r} is no text: load the page again")
    return value or ""


def number(value: object, what: str, low: float | int, high: float | int) -> float | None:
    """A number of a field, or None if it is empty.

    Raises:
        UserError: it is none, or not from `low` to `high`.
    """
    if value is None or value == "":
        return None
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not low <= value <= high:  # nor is it NaN
        raise UserError(f"{what} {value}: give a number from {low:,} to {high:,}")
    return float(value)


def whole(value: object, what: str, low: int = 0, high: int = MOST) -> int | None:
    """As `number`, without a fraction."""
    found = number(value, what, low, high)
    if found is not None and found != int(found):
        raise UserError(f"{what} {found}: give a whole number")
    return None if found is None else int(found)


def decoded(url: object) -> bytes:
    """The bytes of a file that a browser sent within a text; none if there is none.

    Raises:
        UserError: it is anything else, such as an address.
    """
    if not url:
        return b""
    head, comma, data = text(url).partition(";base64,")
    if not comma or not head.startswith("data:") or len(head) > 100:
        raise UserError("choose a file with the button above: nothing else is read")
    try:
        return b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("this file did not arrive whole: choose it again") from None
