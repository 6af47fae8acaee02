"""Keeps averages of the weights from which others, of any length, are made after training."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from safetensors.torch import save_file
from torch import nn

from cascade.files.atomic import remove, write_atomically
from cascade.nets.dtensors import whole
from cascade.runs.averages import decay, exponent
from cascade.runs.run import Position, Run
from cascade.training.callbacks.ema import EMA, Average, begun, move


class PowerAverages(L.Callback):
    """Updates power-function averages (EDM2, section 3.1), and stores them now and then.

    They are part of the checkpoint, so that a resumed run stores the same. Each snapshot takes four
    bytes per parameter and length; with 32 of them, lengths from 0.02 to 0.25 can be made.

    Args:
        run: the run's directory.
        ema: counts the steps that were taken.
        start: where this process starts or resumes.
        total: images in all.
        lengths: of the averages, as shares of the training.
        snapshots: number of snapshots, evenly spaced over the training.
    """

    def __init__(
        self,
        run: Path,
        ema: EMA,
        start: Position,
        total: int,
        lengths: Sequence[float] = (0.05, 0.1),
        snapshots: int = 32,
    ):
        self.run, self.ema, self.start = Run(run), ema, start
        self.gammas = {f"{length:g}": exponent(length) for length in lengths}
        self.averages: dict[str, Average] = {name: {} for name in self.gammas}
        self.step = 0  # of the average
        steps = -(-total // start.batch)
        marks = {-(-steps * (i + 1) // snapshots) for i in range(snapshots)}
        self.marks = sorted(mark for mark in marks if mark > start.step)

    def on_fit_start(self, trainer, module: nn.Module) -> None:
        self.averages = {name: begun(average, module) for name, average in self.averages.items()}

    def on_train_start(self, trainer, module) -> None:
        for step, path in self.run.snapshots() if trainer.is_global_zero else ():
            if step > self.start.step:  # of an attempt that went further, or was rolled back
                remove(path)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.ema.step > self.step:  # otherwise the step was skipped, or is not complete
            self.step = self.ema.step
            for name, average in self.averages.items():
                move(average, module, decay(self.step, self.gammas[name]))
        if self.marks and trainer.global_step >= self.marks[0] and self.step:
            self.marks = [mark for mark in self.marks if mark > trainer.global_step]
            self._store(trainer.global_step, whole(self.averages), trainer.is_global_zero)

    def _store(self, step: int, averages: dict[str, Average], first: bool) -> None:
        if not first:
            return
        tensors = {
            f"{name}/{key}": value.cpu().contiguous()
            for name, average in averages.items()
            for key, value in average.items()
        }
        about = {"step": str(self.step)}
        write_atomically(self.run.snapshot(step), lambda path: save_file(tensors, path, about))

    def state_dict(self) -> dict:
        return {"step": self.step, "averages": whole(self.averages)}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.averages = state["step"], state["averages"]
