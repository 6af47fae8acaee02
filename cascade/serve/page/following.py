"""Between the line's jobs and the page: what a visitor asked for, and how far it is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from cascade.errors import UserError
from cascade.serve.line import Job, Line
from cascade.serve.page.pieces import bar, note, so_far

_APART = 0.2  # seconds between pages of a job's steps
_LOOK = 0.1  # seconds after which a job is looked at that tells nothing, such as one that waits


class Asked(NamedTuple):
    """A request of a visitor.

    Attributes:
        work: as of `Line.submit`.
        shown: the page of its result.
    """

    work: Callable[[Any, Job], Any]
    shown: Callable[[Any], str]


class Desk:
    """Where visitors ask for work, each through a part of the page.

    Attributes:
        parts: by name, how many values a part sends, and what it asks for with them. That raises
            UserError if they are not possible, or OSError.
    """

    def __init__(self, line: Line):
        self.line = line
        self.parts: dict[str, tuple[int, Callable[..., Asked]]] = {}

    async def pages(self, part: str, values: Sequence[Any]) -> AsyncIterator[str]:
        """Do what a part of the page asks for, and give the page as it goes on.

        The work is cancelled if nobody asks for its next page.
        """
        count, asked = self.parts[part]
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def told() -> None:
            with contextlib.suppress(RuntimeError):  # the server ends, and its loop is closed
                loop.call_soon_threadsafe(changed.set)

        try:
            if len(values) != count:
                raise UserError("the page is older than the server: load it again")
            work, shown = await asyncio.to_thread(asked, *values)
            job = self.line.submit(work, told)
        except (UserError, OSError) as error:
            yield note(str(error), "alert")
            return
        try:
            async with contextlib.aclosing(self._followed(job, changed)) as pages:
                async for page in pages:
                    yield page
            yield await asyncio.to_thread(ended, job, shown)
        finally:
            job.cancel()

    async def _followed(self, job: Job, changed: asyncio.Event) -> AsyncIterator[str]:
        last, sent, pictured = None, time.monotonic(), False
        while not job.over:
            job.look()
            here = job.state, job.count, self.line.before(job), self.line.ready.is_set()
            first = not pictured and getattr(job.steps, "pictures", None) is not None
            # The first picture is shown at once. Pages before it would only delay it.
            if here != last and (first or time.monotonic() - sent > _APART):
                last, pictured = here, pictured or first
                yield await asyncio.to_thread(self._page, job)
                sent = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _LOOK)
            changed.clear()

    def _page(self, job: Job) -> str:
        if job.state != "waiting":
            return running(job.steps)
        if not self.line.ready.is_set():
            return bar(0.0, "The model is being loaded.")
        return bar(0.0, waiting(self.line.before(job)))


def waiting(count: int) -> str:
    before = {0: "You are next.", 1: "One request is before yours."}
    return before.get(count, f"{count} requests are before yours.")


def running(steps: Any) -> str:
    """A page of how far a request is (`engine.Steps`)."""
    if steps is None:
        return bar(0.0, "It begins.")
    text = f"{steps.what}: step {steps.at} of {steps.of}"
    found = bar(steps.share, text)
    if steps.pictures is not None:
        found += so_far(steps.pictures, steps.first)
    return found


def ended(job: Job, shown: Callable[[Any], str]) -> str:
    if job.state == "done":
        return note("Done.") + shown(job.result)
    if job.state == "failed":
        return note(job.error, "alert")
    return note("Cancelled.")
