"""Lets a process measure the trained network once training ends (Analytic-DPM's variances)."""

from collections.abc import Iterable

import lightning as L

from cascade.batch import Batch
from cascade.training.callbacks.ema import EMA


class Measure(L.Callback):
    """Calls `module.measure` with the averaged weights after the last step, before it is saved.

    Args:
        ema: the average.
        batches: training samples, without end.
    """

    def __init__(self, ema: EMA, batches: Iterable[Batch]):
        self.ema, self.batches = ema, batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == trainer.max_steps:
            with self.ema.applied(module):
                module.measure(self.batches)
