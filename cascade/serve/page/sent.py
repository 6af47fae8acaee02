"""What browsers send: files within texts."""

import binascii
from base64 import b64decode

from cascade.errors import UserError


def decoded(url: str | None) -> bytes:
    """The bytes of a file that a browser sent within a text; none if there is none.

    Raises:
        UserError: it is anything else, such as an address.
    """
    if not url:
        return b""
    head, comma, data = url.partition(";base64,")
    if not comma or not head.startswith("data:") or len(head) > 100:
        raise UserError("choose a file with the button above: nothing else is read")
    try:
        return b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("this file did not arrive whole: choose it again") from None
