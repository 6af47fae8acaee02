"""What the tests of security share: an object that writes a file when it is unpickled."""

import os

import pytest

from cascade.errors import UserError


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def refused(call, words=""):
    """The one line with which a call is refused."""
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
