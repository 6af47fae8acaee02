"""What a check finds, and how long a check may take.

A check is a function that yields findings. A problem will fail or give wrong numbers, a warning may
surprise, a note is a fact. No module of this package imports at its top what an installation may
lack, but those that look at what only a sound installation can read.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from cascade.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One of them: what is there, and what to do about it."""

    level: Literal["problem", "warning", "note"]
    what: str
    remedy: str = ""


problem, warning, note = (partial(Finding, level) for level in ("problem", "warning", "note"))


def some(count: int, what: str) -> str:
    """ "1 tar", "2,000 tars"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def spread(things: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly."""
    count = min(most, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def told(error: Exception, remedy: str = "") -> Finding:
    """The problem that an error describes.

    Args:
        remedy: where the error does not name one, as most of ours do, behind their last colon.
    """
    what, _, own = str(error).rpartition(": ")
    return problem(str(error), remedy) if remedy else problem(what or own, own)


def guarded(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check. Whatever ends it is the last of them."""
    try:
        yield from check()
    except UserError as error:
        yield told(error)
    except Exception as error:  # of a broken installation it may be anything
        first = str(error).strip().split("\n")[0] or "no message"
        yield problem(
            f"this check broke off ({type(error).__name__}: {first})",
            "mend what is found wrong with the installation, then ask again",
        )


class Budget:
    """Seconds that what takes long may take, all of it together.

    Args:
        seconds: None: as long as it likes.
    """

    def __init__(self, seconds: float | None):
        self.left = seconds

    def within(self, call: Callable[[], T]) -> T:
        """What a call returns or raises. Raises TimeoutError if it is not over in time."""
        done: list[Callable[[], T]] = []

        def work() -> None:
            try:
                value = call()
            except BaseException as error:
                done.append(partial(_raise, error))
            else:
                done.append(lambda: value)

        begun = time.monotonic()
        thread = threading.Thread(target=work, daemon=True)  # it does not keep the process alive
        thread.start()
        thread.join(self.left)
        if self.left is not None:
            self.left = max(0.0, self.left - (time.monotonic() - begun))
        if not done:
            raise TimeoutError
        return done[0]()


def _raise(error: BaseException) -> None:
    raise error
