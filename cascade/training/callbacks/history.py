"""Writes the loss, learning rate and speed of a run: progress bar, metrics.csv, loggers.

Progress is counted in images seen, so that runs with different batch sizes compare. A run that
resumes drops the rows after its checkpoint and writes them again.
"""

import csv
import time
from pathlib import Path

import lightning as L
import torch

from cascade.files.atomic import write_atomically
from cascade.runs.progress import bar
from cascade.runs.run import Position, Run
from cascade.training.callbacks.logging import Logging

SLOW = 0.05  # fraction of the time spent waiting for data above which the bar mentions it


class History(L.Callback):
    """Writes a row of metrics every few steps.

    `waiting` is the fraction of the time that the first rank waited for data. Each of the module's
    `columns` has its own, empty where that loss is switched off.

    Args:
        run: the run's directory.
        name: the stage's name, shown next to the bar.
        start: where this process starts or resumes.
        total: images in all.
        loggers: receive each row.
        every: optimizer steps between two rows.
    """

    COLUMNS = ("images", "loss", "lr", "images_per_second", "waiting", "seconds")

    def __init__(
        self, run: Path, name: str, start: Position, total: int, loggers: Logging, every: int = 20
    ):
        self.run, self.name, self.start, self.loggers = run, name, start, loggers
        self.total, self.every = total, every
        self.losses: list[torch.Tensor] = []
        self.terms: dict[str, list[torch.Tensor]] = {}  # of losses that were attached
        self.step, self.seconds = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step, self.mark = trainer.global_step, time.monotonic()
        self.terms = {name: [] for name in module.trained.columns}
        self.columns = (*self.COLUMNS, *self.terms)
        self.waited = trainer.train_dataloader.waited
        if not trainer.is_global_zero:
            return
        run, images = Run(self.run), self.start.images
        path = run.metrics_file
        rows = [row for row in run.metrics() if int(row["images"]) <= images]
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        write_atomically(path, lambda partial: self._write(partial, rows))
        self.file = path.open("a", newline="")
        self.table = csv.DictWriter(self.file, self.columns)
        self.bar = bar(self.name)
        self.task = self.bar.add_task("", total=self.total, completed=images, rate=0, note="")
        self.bar.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach())
        for name, term in module.trained.terms.items():
            self.terms[name] += [] if term is None else [term]
        steps = trainer.global_step - self.step
        last = trainer.global_step == trainer.max_steps
        if steps == 0 or (trainer.global_step % self.every and not last):
            return
        loss = self._mean(trainer, self.losses, trainer.accumulate_grad_batches)
        terms = {k: self._mean(trainer, of) for k, of in self.terms.items() if of}
        now, waited = time.monotonic(), trainer.train_dataloader.waited
        seconds, wait = now - self.mark, waited - self.waited
        rate, waiting = steps * self.start.batch / seconds, wait / seconds
        self.seconds += seconds
        self.losses, self.step, self.mark, self.waited = [], trainer.global_step, now, waited
        self.terms = {name: [] for name in self.terms}
        if trainer.is_global_zero:
            images = self.start.at(trainer.global_step).images
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            shown = (f"{loss:.5g}", f"{lr:.4g}", f"{rate:.1f}", f"{waiting:.3f}")
            row = (images, *shown, f"{self.seconds:.1f}")
            numbers = dict(zip(self.COLUMNS, row)) | {k: f"{v:.5g}" for k, v in terms.items()}
            self.table.writerow(numbers)
            self.file.flush()
            scalars = dict(zip(self.COLUMNS[1:], (loss, lr, rate, waiting)))
            self.loggers.scalars({**scalars, **terms}, images)
            note = f"loss {loss:.4f}"
            if waiting > SLOW:
                note += f", {waiting:.0%} of the time waiting for data"
            self.bar.update(self.task, completed=images, rate=rate, note=note)

    @staticmethod
    def _mean(trainer: L.Trainer, losses: list[torch.Tensor], factor: int = 1) -> float:
        """Return the mean, without skipped steps, which are not finite, over steps and ranks."""
        some = torch.stack(losses)
        mean = some.where(some.isfinite(), torch.nan).nanmean()
        return trainer.strategy.reduce(mean * factor).item()

    def _write(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows(rows)

    def teardown(self, trainer, module, stage: str | BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()
            self.file.close()

    on_exception = teardown  # after an error, Lightning calls no teardown
