"""The line in which visitors wait, and its workers: one for each device.

A worker is a thread that opens its device once and then does one job after another. A job reports
its steps, which is also where it ends if it was cancelled or if nobody looks at it any more. What a
job fails with is told to its visitor; the worker goes on.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cascade.errors import UserError

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The job was cancelled."""


@dataclass
class Job:
    """One request: what it does, and how far it is.

    Attributes:
        work: is given what the worker opened, and the job itself, to `report` to.
        told: is called by the worker after each report, and at the end.
        steps: what was last reported.
        result: what `work` returned, once `state` is "done".
        error: why it failed, in one line, if `state` is "failed".
    """

    work: Callable[[Any, "Job"], Any]
    patience: float
    told: Callable[[], None] = lambda: None
    state: str = "waiting"  # then running, and done, failed or cancelled
    steps: Any = None
    count: int = 0
    result: Any = None
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def look(self) -> None:
        """Note that somebody looks at the job; without that it ends after its patience."""
        self.seen = time.monotonic()

    def cancel(self) -> None:
        self.stop.set()

    def report(self, steps: Any) -> None:
        """Note how far the job is. Raises Cancelled if it is to end."""
        self.check()
        self.steps = steps
        self.count += 1
        self.told()

    def check(self) -> None:
        """Raise Cancelled if the job is to end."""
        if self.stop.is_set() or self.abandoned:
            raise Cancelled

    @property
    def abandoned(self) -> bool:
        return time.monotonic() - self.seen > self.patience


class Line:
    """Jobs, and the threads that do them.

    Args:
        open: opens a device, given its number, and returns what jobs work with.
        most: jobs that may wait.
        patience: of a job, in seconds.
    """

    def __init__(self, open: Callable[[int], Any], most: int = 100, patience: float = 10.0):
        self._open, self.most, self.patience = open, most, patience
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._workers = 0
        self.ready = threading.Event()  # the first device is open
        self.trouble = ""  # why it could not be opened

    def start(self, workers: int = 1) -> None:
        """Start the workers that are missing, up to this number."""
        with self._changed:
            missing = range(self._workers, workers)
            self._workers = max(self._workers, workers)
        for number in missing:
            threading.Thread(
                target=self._serve, args=(number,), name=f"device {number}", daemon=True
            ).start()

    def submit(
        self, work: Callable[[Any, Job], Any], told: Callable[[], None] = lambda: None
    ) -> Job:
        """Put a job at the end of the line.

        Args:
            told: as of `Job`.

        Raises:
            UserError: too many wait.
        """
        job = Job(work, self.patience, told)
        with self._changed:
            self._forget()
            if len(self._jobs) >= self.most:
                raise UserError(f"{self.most} requests wait already: try again in a while")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def before(self, job: Job) -> int:
        """How many jobs wait before this one."""
        with self._changed:
            self._forget()
            return self._jobs.index(job) if job in self._jobs else 0

    def _forget(self) -> None:
        """Drop the waiting jobs that were cancelled or abandoned."""
        for job in [one for one in self._jobs if one.stop.is_set() or one.abandoned]:
            job.state = "cancelled"
            self._jobs.remove(job)

    def _serve(self, number: int) -> None:
        device = None
        try:
            device = self._open(number)
        except Exception as error:
            log.exception("device %d cannot be opened", number)
            self.trouble = f"the server cannot paint: {error}"
        self.ready.set()
        while True:
            self._do(self._next(), device)

    def _next(self) -> Job:
        with self._changed:
            while True:
                self._forget()
                if self._jobs:
                    job = self._jobs.popleft()
                    job.state = "running"
                    return job
                self._changed.wait(1.0)

    def _do(self, job: Job, device: Any) -> None:
        try:
            if device is None:
                raise UserError(self.trouble)
            job.check()
            job.result = job.work(device, job)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except UserError as error:
            job.error, job.state = str(error), "failed"
        except Exception as error:
            log.exception("a request failed")
            job.error = f"the server could not do this ({type(error).__name__}); its log says more"
            job.state = "failed"
        job.told()
