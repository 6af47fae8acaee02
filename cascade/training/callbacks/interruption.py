"""Stops a run on a signal: between two steps, after saving a checkpoint.

The signal handler only sets a flag. Saving within it would deadlock: the other ranks may be in the
middle of a collective, or may not have received the signal at all. After each optimizer step the
ranks reduce their flags, in the only collective between two steps, so that a signal to one rank
stops all at the same step, and the first rank's clock decides when all save.
"""

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch

from cascade.errors import Failed, Superseded, TryAgain
from cascade.files.lease import Lease
from cascade.files.process import is_first_rank
from cascade.runs.run import event
from cascade.training.callbacks.saving import Checkpoints

# If ranks receive different signals, the greatest number wins, which is SIGTERM's.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
SIGTERM_DELAY = 120  # seconds
# One byte, which forked data workers share: whether the training of their rank has ended.
_ended = mmap.mmap(-1, 1)


@contextmanager
def stoppable(run: Path) -> Iterator[None]:
    """End the process at once on a signal, as long as `Interruption` does not handle it.

    Nothing could be saved at that point. The signal is recorded in the run's events, where a
    launcher looks for the reason that an attempt ended.

    Raises:
        TryAgain: after a signal; its exit code 75, unlike Python's default, is not a failure.
    """
    received = []

    def stop(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        raise SystemExit  # which no `except Exception` in between catches

    before = {number: signal.signal(number, stop) for number in SIGNALS} if _handles() else {}
    _ended[0] = 0
    try:
        yield
    except (SystemExit, KeyboardInterrupt):  # Lightning turns one into the other
        if not received:
            raise
        if is_first_rank() and run.is_dir():
            event(run, "interrupted", signal=received[0], step=None)
        raise TryAgain(f"{received[0]} outside of all steps: the same command resumes") from None
    finally:
        _ended[0] = 1
        for number, handler in before.items():
            signal.signal(number, handler)


def _handles() -> bool:
    """Return whether this thread may install signal handlers: only the main thread may."""
    return threading.current_thread() is threading.main_thread()


class Interruption(L.Callback):
    """Saves and ends the run after SIGTERM, SIGUSR1 or SIGUSR2, with exit code 75.

    It also triggers the periodic checkpoints, because it knows what the ranks agree on. Only the
    callback that saves runs after it. The handlers are installed at `on_train_start`, because
    Lightning installs its own after `on_fit_start`. Those would requeue the job from within the
    handler and deadlock, so the Trainer must be built with `SLURMEnvironment(auto_requeue=False)`.
    SIGINT stays with Lightning.

    Args:
        run: the run's directory.
        checkpoints: saves.
        lease: of that directory, on the first rank; None on the others.
        wait: seconds to wait to be killed after SIGTERM under Slurm, so that Slurm records the job
            as preempted or cancelled rather than completed.

    Raises:
        TryAgain: after a signal, once the checkpoint is saved.
        Superseded: on all ranks; another process has taken over the directory.
        Failed: the ranks are at different samples.
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
        self._share_flags(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            return  # this micro-batch only accumulated gradients
        self.step = trainer.global_step
        self._act(trainer, module, *self._flags.tolist())
        self._share_flags(trainer, module)

    def _share_flags(self, trainer, module) -> None:
        """Start the reduction of all ranks' flags; it is read one step later."""
        consumed = self.checkpoints.start.at(self.step).consumed
        due = trainer.is_global_zero and self.checkpoints.due
        lost = self.lease is not None and self.lease.lost
        # The maximum of -consumed is the minimum of consumed, negated: both ends in one reduction.
        flags = [self.received, consumed, -consumed, due, lost]
        self._flags = torch.tensor(flags, device=module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._flags, op=torch.distributed.ReduceOp.MAX)

    def _act(
        self, trainer, module, received: int, most: int, least: int, due: int, lost: int
    ) -> None:
        """Act on the flags of the step before, whose reduction is done by now: no rank waits."""
        if lost:
            raise Superseded(f"{self.run} was taken over by another process: this one ends")
        if most != -least:
            raise Failed(
                f"ranks are at different samples, {-least} and {most}: they started from different "
                "checkpoints; make sure that all of them see the same files, and start again"
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
            if self.lease:  # so that the next attempt need not wait for it to expire
                self.lease.release()
            time.sleep(self.wait)
        raise TryAgain(f"{name}: stopped after step {step}; the same command resumes from there")

    def _receive(self, number: int, frame: object) -> None:
        self.received = max(self.received, number)

    def on_train_end(self, trainer, module, exception: BaseException | None = None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    on_exception = on_train_end


def ignore_signals(worker: int) -> None:
    """Keep a data worker alive (as `worker_init_fn`) until its rank has stopped.

    Slurm and terminals signal all processes of a job, and a rank whose workers die fails before it
    has saved. SIGTERM is only delayed, since it is also how a rank ends workers that do not exit,
    such as those that a second signal kept it from telling. Once the rank's training has ended, it
    ends them at once.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_worker)


def _end_worker(*_: object) -> None:
    if _ended[0]:
        os._exit(0)
    signal.alarm(SIGTERM_DELAY)
