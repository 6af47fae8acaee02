"""Ends a run that hangs, with exit code 75, after writing the stacks of all threads.

A hang is usually a collective that one rank never joins. Ending it must wait for nothing, least of
all for the other ranks, so each rank watches itself.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from cascade.runs.run import Run, event

TRY_AGAIN = 75
SLOW = 3


class Progress(NamedTuple):
    step: int
    phase: str
    at: float  # time.monotonic()


class Watchdog(L.Callback):
    """Ends this process when a training step makes no progress for `seconds`.

    Work between steps (saving, sampling, waiting for data), the first step (compilation) and what
    follows the last may take `SLOW` times as long. Lengthy work calls `beat` now and then. Runs
    before all other callbacks, so that their work counts as between steps. It is started before the
    Trainer, since ranks wait for each other before any callback is called.

    Writes `heartbeats/rank{i}.json` to the run's directory (`step`, `phase`, and the `time` of the
    last progress) every 10 s or a quarter of `seconds`, and finally `stacks-rank{i}.txt`.

    Args:
        run: the run's directory.
        seconds: the longest time without progress.
    """

    def __init__(self, run: Path, seconds: float):
        self.run, self.seconds = run, seconds
        self.progress = Progress(0, "start", time.monotonic())
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str, step: int | None = None) -> None:
        """Record progress; `step` stays the same unless given."""
        step = self.progress.step if step is None else step
        self.progress = Progress(step, phase, time.monotonic())

    def start(self, rank: int) -> None:
        """Watch from now on. `stop` ends that, as do the end of training and an error."""
        self.rank = rank
        self.beat("start")
        self._over.clear()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def setup(self, trainer, module, stage: str) -> None:
        self.beat("start")

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.progress.phase != "start":
            self.beat("step", trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.beat("between steps", trainer.global_step)

    def on_train_end(self, trainer, module) -> None:
        self.beat("end", trainer.global_step)

    def teardown(self, trainer, module, stage: str | BaseException) -> None:
        self.stop()

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        """After an error, Lightning calls no teardown.

        A rank that waits for another fails at the moment when that one's watchdog ends it: then it
        was as long without progress itself, and its own would have ended it.
        """
        waited = time.monotonic() - self.progress.at
        hung = self.progress.phase == "step" and waited > self.seconds / 2
        if hung and trainer.world_size > 1 and isinstance(exception, RuntimeError):
            self._end(self._facts())
        self.stop()

    def stop(self) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        # If something holds the GIL, or the thread blocks on a dead disk, faulthandler's own C
        # thread ends the process (with exit code 1, which is fixed).
        faulthandler.dump_traceback_later(2 * SLOW * self.seconds, exit=True)

    def _watch(self) -> None:
        every = min(10.0, self.seconds / 4)
        while not self._over.wait(every):
            self._arm()
            progress, now = self.progress, time.monotonic()
            facts = {"step": progress.step, "phase": progress.phase}
            self._write({**facts, "time": round(time.time() - (now - progress.at), 3)})
            limit = self.seconds * (1 if progress.phase == "step" else SLOW)
            if now - progress.at > limit:
                self._end(self._facts())

    def _facts(self) -> dict[str, Any]:
        step, phase, at = self.progress
        seconds = round(time.monotonic() - at, 1)
        return {"rank": self.rank, "step": step, "phase": phase, "seconds": seconds}

    def _write(self, facts: dict[str, Any]) -> None:
        path = Run(self.run).heartbeat(self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(facts) + "\n")
        os.replace(partial, path)

    def _end(self, facts: dict[str, Any]) -> None:
        try:
            print("cascade: no progress, ending this process:", facts, file=sys.__stderr__)
            faulthandler.dump_traceback(sys.__stderr__)
            with (self.run / f"stacks-rank{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
            event(self.run, "hung", **facts)
        finally:
            os._exit(TRY_AGAIN)
