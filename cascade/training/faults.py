"""Injected faults (`faults=...`), for the tests and for drills on one's own cluster.

Each strikes once in a run, in optimizer step `step` (counted from 0) or soon after, on one rank. A
marker in the run's directory is made just before, so that the resumed run does not meet it again.
"""

import errno
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import lightning as L
from torch import Tensor

from cascade.errors import UserError
from cascade.runs.run import Run


@dataclass(frozen=True)
class Plan:
    """When and where a fault strikes.

    Args:
        run: the run's directory.
        step: the first optimizer step in which it may strike.
        rank: None: every rank.
        times: in how many consecutive steps; None: once, as soon as possible from `step` on.
    """

    run: Path
    step: int
    rank: int | None
    times: int | None = None

    def due(self, trainer: L.Trainer, fault: L.Callback) -> bool:
        """Return whether to strike now; if so, leave a marker."""
        step, name = trainer.global_step, type(fault).__name__
        last = step if self.times is None else self.step + self.times - 1
        if not self.step <= step <= last or self.rank not in (None, trainer.global_rank):
            return False
        which = self.step if self.times is None else step
        marker = self.run / "drill" / f"{name}-{which}-rank{trainer.global_rank}"
        if marker.exists():
            return False
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return True


class Loss(L.Callback):
    """Multiplies the loss: by nan, or by so much that it spikes."""

    def __init__(
        self, run: str, step: int, factor: Annotated[float, "nan"], rank: int | None, times: int
    ):
        self.plan, self.factor = Plan(Path(run), step, rank, times), factor

    def on_before_backward(self, trainer, module, loss: Tensor) -> None:
        if self.plan.due(trainer, self):
            loss.mul_(self.factor)


class Gradient(L.Callback):
    """Makes one number of one gradient infinite, on this rank only."""

    def __init__(self, run: str, step: int, rank: int | None, times: int):
        self.plan = Plan(Path(run), step, rank, times)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if self.plan.due(trainer, self):
            gradients = (p.grad for p in module.parameters() if p.grad is not None)
            next(gradients).view(-1)[0] = float("inf")


class Signal(L.Callback):
    """Sends a signal to this process: SIGKILL, SIGTERM, SIGUSR1, ..."""

    def __init__(self, run: str, step: int, name: str, rank: int | None):
        self.plan, self.number = Plan(Path(run), step, rank), getattr(signal, name)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.plan.due(trainer, self):
            os.kill(os.getpid(), self.number)


class Crash(L.Callback):
    """Raises an unexpected error."""

    def __init__(self, run: str, step: int, rank: int | None):
        self.plan = Plan(Path(run), step, rank)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.plan.due(trainer, self):
            raise RuntimeError("an injected crash")


class Hang(L.Callback):
    """Blocks for some seconds; None: for ever."""

    def __init__(self, run: str, step: int, rank: int | None, seconds: float | None):
        self.plan, self.seconds = Plan(Path(run), step, rank), seconds

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.plan.due(trainer, self):
            threading.Event().wait(self.seconds)


class DeadWorker(L.Callback):
    """Kills a data worker."""

    def __init__(self, run: str, step: int, rank: int | None):
        self.plan = Plan(Path(run), step, rank)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.plan.due(trainer, self):
            workers = multiprocessing.active_children()
            if not workers:
                raise UserError("there is no data worker to kill: add workers=1")
            workers[0].kill()


class FlippedByte(L.Callback):
    """Flips a byte in the middle of the newest checkpoint, once there is one."""

    def __init__(self, run: str, step: int):
        self.plan = Plan(Path(run), step, rank=0)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        checkpoints = Run(self.plan.run).checkpoints()
        if checkpoints and self.plan.due(trainer, self):
            path = max(checkpoints[-1].path.iterdir(), key=lambda file: file.stat().st_size)
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 255]))


class FullDisk(L.Callback):
    """Makes the next checkpoint find no space left on the disk."""

    def __init__(self, run: str, step: int):
        self.plan = Plan(Path(run), step, rank=0)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self.plan.due(trainer, self):
            checkpoint["drill"] = _NoSpace()


class KilledSave(L.Callback):
    """Kills the process while it writes the next checkpoint."""

    def __init__(self, run: str, step: int):
        self.plan = Plan(Path(run), step, rank=0)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self.plan.due(trainer, self):
            checkpoint["drill"] = _Death()


class _NoSpace:
    def __reduce__(self) -> NoReturn:  # called while the checkpoint is being serialized
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Death:
    def __reduce__(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
