"""Samples a grid of pictures now and then, to show how a stage develops."""

from pathlib import Path

import lightning as L
import torch
from PIL import Image

from cascade.batch import Batch
from cascade.data.loading import on
from cascade.grids import grid, to_uint8
from cascade.runs.run import Position, Run
from cascade.training.callbacks.ema import EMA
from cascade.training.callbacks.logging import Logging


class SampleGrids(L.Callback):
    """Samples the same batch in the course of training, with the averaged weights.

    Args:
        run: the run's directory; grids are `samples/{images}.png`, the data `samples/truth.png`.
        ema: the average.
        start: where this process starts or resumes.
        batch: held-out samples, with all keys that the stage reads.
        label: precedes each caption; marks samples that are not held out.
        images: the numbers of images seen at which to sample.
        loggers: receive each grid.
    """

    def __init__(
        self,
        run: Path,
        ema: EMA,
        start: Position,
        batch: Batch,
        label: str,
        images: list[int],
        loggers: Logging,
    ):
        self.loggers = loggers
        self.run, self.ema, self.start, self.batch, self.label = run, ema, start, batch, label
        self.images = sorted(n for n in images if n > start.images)  # others are on disk already

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            sheet = self._save(self.batch[module.trained.writes], "truth")
            self.loggers.picture("truth", sheet, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        seen = self.start.at(trainer.global_step).images
        if not any(n <= seen for n in self.images):
            return
        self.images = [n for n in self.images if n > seen]
        here = on(self.batch, module.device)
        with self.ema.applied(module):  # on all ranks: sharded weights need them, others would wait
            pictures = module.sample(here, seed=0)
        if trainer.is_global_zero:
            self.loggers.picture("samples", self._save(pictures, f"{seen:010d}"), seen)

    def _save(self, pictures: torch.Tensor, name: str) -> Image.Image:
        folder = Run(self.run).samples
        folder.mkdir(parents=True, exist_ok=True)
        scale = max(1, 128 // pictures.shape[-1])  # captions need some width
        captions = [self.label + caption for caption in self.batch["caption"]]
        sheet = grid(to_uint8(pictures), 8, captions=captions, scale=scale)
        sheet.save(folder / f"{name}.png")
        return sheet
