"""Progress bars, which become lines of a log where there is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def bar(what: str, unit: str = "images") -> Progress:
    """A progress bar with counts, rate and time left.

    Without a terminal (a log file, Slurm) it prints a plain line now and then.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        return _Lines(what, unit, console)
    return Progress(
        TextColumn(f"[bold]{what:<12}"),
        BarColumn(bar_width=28),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=2,
    )


class _Lines(Progress):
    """Prints the first and the last state of a task, and others at most every `SECONDS`."""

    SECONDS = 30.0

    def __init__(self, what: str, unit: str, console: Console):
        super().__init__(console=console, disable=True)  # no bar
        self.what, self.unit, self.next = what, unit, 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        task, now = self.tasks[task_id], time.monotonic()
        if now < self.next and not task.finished:
            return
        self.next = now + self.SECONDS
        rate, note = task.fields["rate"], task.fields["note"]
        seconds = max(0, int(task.remaining / rate)) if rate else 0  # a batch may exceed the total
        left = f"{timedelta(seconds=seconds)} left" if rate else ""
        done = f"{task.completed:,.0f}/{task.total:,.0f} {self.unit}"
        parts = (f"{datetime.now():%H:%M:%S} {self.what}: {done}", f"{rate:,.1f}/s", left, note)
        line = ", ".join(part for part in parts if part)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, and a function that updates it with (done, total)."""
    with bar(what, unit) as progress:
        task = progress.add_task("", total=1, rate=0, note="")

        def report(done: int, total: int) -> None:
            rate = done / max(progress.tasks[0].elapsed or 0, 1e-3)
            progress.update(task, completed=done, total=total, rate=rate)

        yield report
