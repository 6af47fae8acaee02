"""Findings of the doctor's checks, and the time that checks may take.

A check is a function that yields findings: a problem will fail or give wrong numbers, a warning may
surprise, a note is a fact. The checks that must run on a broken installation import only the
standard library at their top.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from cascade.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it."""

    level: Literal["problem", "warning", "note"]
    what: str
    remedy: str = ""


problem, warning, note = (partial(Finding, level) for level in ("problem", "warning", "note"))


def some(count: int, what: str) -> str:
    """ "1 tar", "2,000 tars"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def spread(things: Sequence[T], most: int) -> list[T]:
    """At most `most` of the things, evenly spaced."""
    count = min(most, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def told(error: Exception, remedy: str = "") -> Finding:
    """Turn an error into a problem.

    Args:
        remedy: if the message does not end with one, after its last colon, as UserErrors do.
    """
    what, _, own = str(error).rpartition(": ")
    return problem(str(error), remedy) if remedy else problem(what or own, own)


def guarded(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check. If it raises, the error becomes the last finding."""
    try:
        yield from check()
    except UserError as error:
        yield told(error)
    except Exception as error:  # a broken installation may raise anything
        first = str(error).strip().split("\n")[0] or "no message"
        yield problem(
            f"this check failed ({type(error).__name__}: {first})",
            "fix the problems of the installation, then run the doctor again",
        )


class Budget:
    """The total time for slow checks.

    Args:
        seconds: None: no limit.
    """

    def __init__(self, seconds: float | None):
        self.left = seconds

    def within(self, call: Callable[[], T]) -> T:
        """The result of a call, in a thread. Raises TimeoutError if the time is used up."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        begun = time.monotonic()
        threading.Thread(target=work, daemon=True).start()  # it does not keep the process alive
        try:
            return done.result(self.left)
        finally:
            if self.left is not None:
                self.left = max(0.0, self.left - (time.monotonic() - begun))
