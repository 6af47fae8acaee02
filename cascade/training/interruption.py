"""Signals that ask a run to stop: it stops behind a checkpoint, between two steps.

A handler only makes a note. Saving within it would deadlock: the other ranks may be in the middle
of a collective, or may not have got the signal at all. After each optimizer step the ranks compare
notes, so that a signal to one of them stops all at the same step.
"""

import os
import signal
import threading
import time
from pathlib import Path

import lightning as L
import torch

from cascade.errors import Failed, TryAgain
from cascade.training.checkpoint import Checkpoints
from cascade.training.events import event

# The greatest of the numbers that ranks got is the one that counts: SIGTERM, as it happens.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
PUT_OFF = 120  # seconds


class Interruption(L.Callback):
    """Ends the run behind a checkpoint after SIGTERM, SIGUSR1 or SIGUSR2, with exit code 75.

    Only the callback that saves stands behind it. The handlers are installed at `on_train_start`,
    because Lightning installs its own, which deadlock, behind `on_fit_start`; whoever builds the
    Trainer switches its requeueing off (`SLURMEnvironment(auto_requeue=False)`). SIGINT stays
    Lightning's.

    Args:
        run: the run's directory.
        checkpoints: saves.
        wait: seconds to wait for being killed after SIGTERM under Slurm, which then marks the job
            as preempted or cancelled, and not as ended by itself.

    Raises:
        TryAgain: after a signal, behind the checkpoint.
        Failed: the ranks are not at the same sample.
    """

    def __init__(self, run: Path, checkpoints: Checkpoints, wait: float = 60):
        self.run, self.checkpoints, self.wait = run, checkpoints, wait
        self.received, self.step = 0, -1
        self._before: dict[int, object] = {}
        self._notes: torch.Tensor | None = None

    def setup(self, trainer, module, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():  # others may not have handlers
            self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        for number in self._before:
            signal.signal(number, self._note)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            return  # this micro-batch only accumulated
        self.step = trainer.global_step
        consumed = self.step * module.batch + self.checkpoints.offset
        notes = torch.tensor([self.received, consumed, -consumed], device=module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
        # A step later they are there: reading them then makes no GPU wait.
        earlier, self._notes = self._notes, notes
        if earlier is None:
            return
        received, last, first = earlier.tolist()
        if last != -first:
            raise Failed(
                f"ranks are at different samples, {-first} and {last}: they started from different "
                "checkpoints; see that all of them see the same files, and start again"
            )
        if received:
            self._stop(trainer, module, received)

    def _stop(self, trainer, module, number: int) -> None:
        name, step = signal.Signals(number).name, trainer.global_step
        self.checkpoints.save(trainer, module)
        if trainer.is_global_zero:
            event(self.run, "interrupted", signal=name, step=step)
        if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            time.sleep(self.wait)
        raise TryAgain(f"{name}: stopped behind step {step}; the same command goes on from there")

    def _note(self, number: int, frame: object) -> None:
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
