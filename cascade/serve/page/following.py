"""Between the line's jobs and the page's events: who asked for what, and how far it is."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cascade.errors import UserError
from cascade.serve.line import Job, Line
from cascade.serve.page.pieces import bar, note, sheet

_OFTEN, _APART = 0.005, 0.08  # seconds between looks at a job, and between pages of its steps


class Desk:
    """The jobs of each visitor, one for each part of the page.

    A visitor is known by the session that Gradio gives to each open page.
    """

    def __init__(self, line: Line):
        self.line = line
        self._jobs: dict[tuple[str, str], Job] = {}

    def cancel(self, session: str | None, part: str) -> None:
        """Cancel what this visitor waits for in this part of the page."""
        if job := self._jobs.get((session or "", part)):
            job.cancel()

    async def asked(
        self,
        session: str | None,
        part: str,
        work: Callable[[Any, Job], Any],
        shown: Callable[[Any], str],
    ) -> AsyncIterator[str]:
        """Do some work for a visitor, and give the page at each step.

        Args:
            work: as of `Line.submit`.
            shown: the page of its result.
        """
        key = session or "", part
        self.cancel(session, part)  # what the visitor asked for before
        try:
            job = self.line.submit(work)
        except UserError as error:
            yield note(str(error), "alert")
            return
        self._jobs[key] = job
        try:
            async for page in self._followed(job):
                yield page
            yield ended(job, shown)
        finally:
            job.cancel()
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _followed(self, job: Job) -> AsyncIterator[str]:
        last, sent, pictured = None, time.monotonic(), False
        while not job.over:
            job.look()
            here = job.state, job.count, self.line.before(job), self.line.ready.is_set()
            first = not pictured and getattr(job.steps, "pictures", None) is not None
            # The first picture is shown at once. Pages before it would only delay it.
            if here != last and (first or time.monotonic() - sent > _APART):
                last, sent, pictured = here, time.monotonic(), pictured or first
                yield self._page(job)
            await asyncio.sleep(_OFTEN)

    def _page(self, job: Job) -> str:
        if job.state != "waiting":
            return running(job.steps)
        if not self.line.ready.is_set():
            return bar(0, "The model is being loaded.")
        return bar(0, waiting(self.line.before(job)))


def waiting(count: int) -> str:
    before = {0: "You are next.", 1: "One request is before yours."}
    return before.get(count, f"{count} requests are before yours.")


def running(steps: Any) -> str:
    """A page of how far a request is (`engine.Steps`)."""
    if steps is None:
        return bar(0, "It begins.")
    text = f"{steps.what}: step {steps.at} of {steps.of}"
    found = bar(steps.share, text)
    if steps.pictures is not None:
        numbers = range(steps.first + 1, steps.first + len(steps.pictures) + 1)
        found += sheet(steps.pictures, [f"picture {i} so far" for i in numbers])
    return found


def ended(job: Job, shown: Callable[[Any], str]) -> str:
    if job.state == "done":
        return note("Done.") + shown(job.result)
    if job.state == "failed":
        return note(job.error, "alert")
    return note("Cancelled.")
