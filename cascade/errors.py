"""The ways a command can fail. Each prints one line on the terminal and has its own exit code."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Invalid configuration or input: exit code 2. The message is one line and names the remedy."""


class Failed(Exception):
    """The training itself failed: exit code 1. The message names the last good checkpoint."""


class TryAgain(Exception):
    """Stopped cleanly after a checkpoint: exit code 75. The same command resumes."""


class Superseded(TryAgain, OSError):
    """Another process has taken over the folder: exit code 75, and nothing more is written there.

    It is an OSError too, so that a write refused by the lease is handled like one refused by the
    disk.
    """


@contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turns an error of the file system into a UserError: "cannot read FILE: Permission denied".

    Args:
        remedy: ends the message, such as "; make room".
    """
    try:
        yield
    except Superseded:
        raise
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{remedy}") from error
