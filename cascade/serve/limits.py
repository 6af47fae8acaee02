"""What a visitor can ask for at most. Whoever starts the server decides."""

import re
from dataclasses import dataclass

from cascade.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Args:
        most_pictures: of one request.
        longest: characters of a caption.
        most_steps: of one stage's sampler.
        memory: bytes of loaded weights.
        most_waiting: requests that wait, of all visitors together.
        patience: seconds after which a request ends that nobody looks at any more.

    Raises:
        UserError: a limit that lets nothing through.
    """

    most_pictures: int = 16
    longest: int = 2000
    most_steps: int = 250
    memory: int = 8 << 30
    most_waiting: int = 100
    patience: float = 10.0

    def __post_init__(self):
        for name in ("most_pictures", "longest", "most_steps", "memory"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)}: give at least 1")

    def check_captions(self, captions: list[str]) -> None:
        """Raise UserError if one is longer than is allowed."""
        for caption in captions:
            if len(caption) > self.longest:
                raise UserError(
                    f"a caption has {len(caption):,} characters: {self.longest:,} is the most here"
                )

    def check_count(self, count: int) -> None:
        """Raise UserError if these are too many pictures, or none."""
        if not 1 <= count <= self.most_pictures:
            raise UserError(f"{count:,} pictures: give from 1 to {self.most_pictures:,}")

    def check_steps(self, steps: int, where: str) -> None:
        """Raise UserError if a stage would take more steps than are allowed."""
        if not 1 <= steps <= self.most_steps:
            raise UserError(f"{where} takes {steps:,} steps: give from 1 to {self.most_steps:,}")


def bytes_of(text: str) -> int:
    """The bytes that "8G", "512M" or a plain number means.

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip().upper())
    if not found:
        raise UserError(f"--memory {text}: give bytes, such as 8G or 512M")
    return int(float(found[1]) * _UNITS[found[2]])


def check_address(host: str, password: str | None) -> None:
    """Raise UserError if others could use the page without a password."""
    if host not in LOOPBACK and not password:
        raise UserError(
            f"--host {host} lets others use this machine: put a password into the environment "
            "variable CASCADE_PASSWORD, or leave --host out"
        )
