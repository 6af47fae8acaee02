"""Signals that ask a run to stop: it stops behind a checkpoint, between two steps.

A handler only makes a note. Saving within it would deadlock: the other ranks may be in the middle
of a collective, or may not have got the signal at all. After each optimizer step the ranks compare
notes, in the one collective that they share between two steps: a signal to one of them stops all at
the same step, and the clock of the first says when all save.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch

from cascade.data.lease import Lease
from cascade.done import is_first_rank
from cascade.errors import Failed, Superseded, TryAgain
from cascade.training.checkpoint import Checkpoints
from cascade.training.events import event

# The greatest of the numbers that ranks got is the one that counts: SIGTERM, as it happens.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
PUT_OFF = 120  # seconds


@contextmanager
def stoppable(run: Path) -> Iterator[None]:
    """Until `Interruption` listens, a signal ends the process at once: nothing would be saved.

    The run's timeline names the signal: its launcher looks there for what ended an attempt.

    Raises:
        TryAgain: after a signal, with exit code 75, where Python's own is that of a failure.
    """
    received = []

    def stop(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        raise SystemExit  # which no `except Exception` on the way takes for its own

    before = {number: signal.signal(number, stop) for number in SIGNALS} if _handles() else {}
    try:
        yield
    except (SystemExit, KeyboardInterrupt):  # Lightning makes one of the other
        if not received:
            raise
        if is_first_rank() and run.is_dir():
            event(run, "interrupted", signal=received[0], step=None)
        raise TryAgain(f"{received[0]} outside of all steps: the same command goes on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handles() -> bool:
    """Only a process's first thread may have handlers."""
    return threading.current_thread() is threading.main_thread()


class Interruption(L.Callback):
    """Ends the run behind a checkpoint after SIGTERM, SIGUSR1 or SIGUSR2, with exit code 75.

    It also tells `checkpoints` when to save, as it knows what the ranks agree on.

    Only the callback that saves stands behind it. The handlers are installed at `on_train_start`,
    because Lightning installs its own, which deadlock, behind `on_fit_start`; whoever builds the
    Trainer switches its requeueing off (`SLURMEnvironment(auto_requeue=False)`). SIGINT stays
    Lightning's.

    Args:
        run: the run's directory.
        checkpoints: saves.
        lease: of that directory, on the first rank; None on the others.
        wait: seconds to wait for being killed after SIGTERM under Slurm, which then marks the job
            as preempted or cancelled, and not as ended by itself.

    Raises:
        TryAgain: after a signal, behind the checkpoint.
        Superseded: on all ranks: another process has taken over the directory.
        Failed: the ranks are not at the same sample.
    """

    def __init__(
        self, run: Path, checkpoints: Checkpoints, lease: Lease | None = None, wait: float = 60
    ):
        self.run, self.checkpoints, self.lease, self.wait = run, checkpoints, lease, wait
        self.received, self.step = 0, -1
        self._before: dict[int, object] = {}

    def setup(self, trainer, module, stage: str) -> None:
        if _handles():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        for number in self._before:
            signal.signal(number, self._receive)
        self._take_notes(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            return  # this micro-batch only accumulated
        self.step = trainer.global_step
        self._read(trainer, module, *self._notes.tolist())
        self._take_notes(trainer, module)

    def _take_notes(self, trainer, module) -> None:
        consumed = self.step * module.batch + self.checkpoints.offset
        due = trainer.is_global_zero and self.checkpoints.due
        lost = self.lease is not None and self.lease.lost
        notes = [self.received, consumed, -consumed, due, lost]
        self._notes = torch.tensor(notes, device=module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._notes, op=torch.distributed.ReduceOp.MAX)

    def _read(
        self, trainer, module, received: int, last: int, first: int, due: int, lost: int
    ) -> None:
        """The notes of the step before, which are there by now: nothing waits for them."""
        if lost:
            raise Superseded(f"{self.run} was taken over by another process: this one ends")
        if last != -first:
            raise Failed(
                f"ranks are at different samples, {-first} and {last}: they started from different "
                "checkpoints; see that all of them see the same files, and start again"
            )
        if received:
            self._stop(trainer, module, received)
        if due:
            self.checkpoints.save(trainer, module)

    def _stop(self, trainer, module, number: int) -> None:
        name, step = signal.Signals(number).name, trainer.global_step
        self.checkpoints.save(trainer, module)
        if trainer.is_global_zero:
            event(self.run, "interrupted", signal=name, step=step)
        if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            if self.lease:  # whoever comes next need not wait for this one
                self.lease.release()
            time.sleep(self.wait)
        raise TryAgain(f"{name}: stopped behind step {step}; the same command goes on from there")

    def _receive(self, number: int, frame: object) -> None:
        self.received = max(self.received, number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_end(self, trainer, module) -> None:
        self._restore()

    def on_exception(self, trainer, module, exception) -> None:
        self._restore()


def deaf(worker: int) -> None:
    """Makes a process that reads data (`worker_init_fn`) wait until its rank has stopped.

    Slurm and terminals signal all processes of a job, and a rank whose workers die fails before it
    has saved. SIGTERM is also how a rank ends workers that do not listen: it is only put off.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(PUT_OFF))
