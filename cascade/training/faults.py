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


@dataclass(kw_only=True, eq=False)
class Fault(L.Callback):
    """When and where a fault strikes.

    Args:
        run: the run's directory.
        step: the first optimizer step in which it may strike.
        rank: None: every rank.
        times: in how many consecutive steps; None: once, as soon as possible from `step` on.
    """

    run: str
    step: int
    rank: int | None
    times: int | None = None

    def due(self, trainer: L.Trainer) -> bool:
        """Return whether to strike now; if so, leave a marker."""
        step, name = trainer.global_step, type(self).__name__
        last = step if self.times is None else self.step + self.times - 1
        if not self.step <= step <= last or self.rank not in (None, trainer.global_rank):
            return False
        which = self.step if self.times is None else step
        marker = Path(self.run) / "drill" / f"{name}-{which}-rank{trainer.global_rank}"
        if marker.exists():
            return False
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return True


@dataclass(kw_only=True, eq=False)
class Loss(Fault):
    """Multiplies the loss: by nan, or by so much that it spikes."""

    factor: Annotated[float, "nan"]

    def on_before_backward(self, trainer, module, loss: Tensor) -> None:
        if self.due(trainer):
            loss.mul_(self.factor)


class Gradient(Fault):
    """Makes one number of one gradient infinite, on this rank only."""

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if self.due(trainer):
            gradients = (p.grad for p in module.parameters() if p.grad is not None)
            next(gradients).view(-1)[0] = float("inf")


@dataclass(kw_only=True, eq=False)
class Signal(Fault):
    """Sends a signal to this process: SIGKILL, SIGTERM, SIGUSR1, ..."""

    name: str

    def __post_init__(self) -> None:
        self.number = getattr(signal, self.name)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.due(trainer):
            os.kill(os.getpid(), self.number)


class Crash(Fault):
    """Raises an unexpected error."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.due(trainer):
            raise RuntimeError("an injected crash")


@dataclass(kw_only=True, eq=False)
class Hang(Fault):
    """Blocks for some seconds; None: for ever."""

    seconds: float | None

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.due(trainer):
            threading.Event().wait(self.seconds)


class DeadWorker(Fault):
    """Kills a data worker."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.due(trainer):
            workers = multiprocessing.active_children()
            if not workers:
                raise UserError("there is no data worker to kill: add workers=1")
            workers[0].kill()


class OfCheckpoints(Fault):
    """A fault of the first rank, which writes the checkpoints."""

    def __init__(self, run: str, step: int):
        super().__init__(run=run, step=step, rank=0)


class FlippedByte(OfCheckpoints):
    """Flips a byte in the middle of the newest checkpoint, once there is one."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        checkpoints = Run(Path(self.run)).checkpoints()
        if checkpoints and self.due(trainer):
            path = max(checkpoints[-1].path.iterdir(), key=lambda file: file.stat().st_size)
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 255]))


class FullDisk(OfCheckpoints):
    """Makes the next checkpoint find no space left on the disk."""

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self.due(trainer):
            checkpoint["drill"] = _NoSpace()


class KilledSave(OfCheckpoints):
    """Kills the process while it writes the next checkpoint."""

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self.due(trainer):
            checkpoint["drill"] = _Death()


class _NoSpace:
    def __reduce__(self) -> NoReturn:  # called while the checkpoint is being serialized
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Death:
    def __reduce__(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
