"""What a person sees of a training: a progress bar, a table of metrics, grids of samples.

Progress is counted in images seen, so that runs with different batch sizes compare. A run that
goes on leaves out what was written behind its checkpoint, and writes it again.
"""

import csv
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cascade.conditioning import Batch
from cascade.files import write_atomically
from cascade.grids import grid, to_uint8
from cascade.training.ema import EMA


def bar(what: str, unit: str = "images") -> Progress:
    """A progress bar with counts, rate and time left, for any long step.

    Without a terminal (a log file, Slurm) it is a plain line now and then.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        return _Lines(what, unit, console)
    return Progress(
        TextColumn(f"[bold]{what:<12}"),
        BarColumn(bar_width=28),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=2,
    )


class _Lines(Progress):
    """The first state of a task, the last, and what is between at most every `SECONDS`."""

    SECONDS = 30.0

    def __init__(self, what: str, unit: str, console: Console):
        super().__init__(console=console, disable=True)  # draws nothing by itself
        self.what, self.unit, self.next = what, unit, 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        task, now = self.tasks[task_id], time.monotonic()
        if now < self.next and not task.finished:
            return
        self.next = now + self.SECONDS
        rate, note = task.fields["rate"], task.fields["note"]
        seconds = max(0, int(task.remaining / rate)) if rate else 0  # a batch may go past the end
        left = f"{timedelta(seconds=seconds)} left" if rate else ""
        done = f"{task.completed:,.0f}/{task.total:,.0f} {self.unit}"
        parts = (f"{datetime.now():%H:%M:%S} {self.what}: {done}", f"{rate:,.1f}/s", left, note)
        line = ", ".join(part for part in parts if part)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


SLOW = 0.05  # of the time spent waiting for data, and the bar says so


class History(L.Callback):
    """Writes loss, learning rate and speed: progress bar, `metrics.csv`, TensorBoard.

    `waiting` is the share of the time in which the first rank waited for data.

    Args:
        run: the run's directory.
        name: the stage's name, shown beside the bar.
        total: images in all.
        every: optimizer steps between two rows.
    """

    COLUMNS = ("images", "loss", "lr", "images_per_second", "waiting", "seconds")

    def __init__(self, run: Path, name: str, total: int, every: int = 20):
        self.run, self.name, self.total, self.every = run, name, total, every
        self.losses: list[torch.Tensor] = []
        self.step, self.seconds = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step, self.mark = trainer.global_step, time.monotonic()
        self.waited = trainer.train_dataloader.waited
        if not trainer.is_global_zero:
            return
        images = self.step * module.batch
        path = self.run / "metrics.csv"
        rows = _rows(path, images)
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        write_atomically(path, lambda beside: self._write(beside, rows))
        self.file = path.open("a", newline="")
        self.table = csv.DictWriter(self.file, self.COLUMNS)
        # TensorBoard hides what came before at this step and later.
        self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=images + 1)
        self.bar = bar(self.name)
        self.task = self.bar.add_task("", total=self.total, completed=images, rate=0, note="")
        self.bar.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach())
        steps = trainer.global_step - self.step
        last = trainer.global_step == trainer.max_steps
        if steps == 0 or (trainer.global_step % self.every and not last):
            return
        losses = torch.stack(self.losses)  # what is not finite is of a skipped step
        loss = (
            losses.where(losses.isfinite(), torch.nan).nanmean() * trainer.accumulate_grad_batches
        )
        loss = trainer.strategy.reduce(loss).item()  # of all ranks
        now, waited = time.monotonic(), trainer.train_dataloader.waited
        seconds, wait = now - self.mark, waited - self.waited
        rate, waiting = steps * module.batch / seconds, wait / seconds
        self.seconds += seconds
        self.losses, self.step, self.mark, self.waited = [], trainer.global_step, now, waited
        if trainer.is_global_zero:
            images = trainer.global_step * module.batch
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            shown = (f"{loss:.5g}", f"{lr:.4g}", f"{rate:.1f}", f"{waiting:.3f}")
            row = (images, *shown, f"{self.seconds:.1f}")
            self.table.writerow(dict(zip(self.COLUMNS, row)))
            self.file.flush()
            for key, value in zip(self.COLUMNS[1:], (loss, lr, rate, waiting)):
                self.board.add_scalar(key, value, images)
            note = f"loss {loss:.4f}"
            if waiting > SLOW:
                note += f", {waiting:.0%} of the time waiting for data"
            self.bar.update(self.task, completed=images, rate=rate, note=note)

    def _write(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, self.COLUMNS)
            table.writeheader()
            table.writerows(rows)

    def on_exception(self, trainer, module, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")  # which Lightning then leaves out

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()
            self.board.close()
            self.file.close()


def _rows(path: Path, images: int) -> list[dict[str, str]]:
    """The rows of a table up to so many images; of the last, a kill may have left a part."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if int(row["images"]) <= images]


class SampleGrids(L.Callback):
    """Paints the same batch over the course of the training, with the average's weights.

    Args:
        run: the run's directory; the grids are `samples/{images}.png`, and the truth `truth.png`.
        ema: the average.
        batch: of held-out samples, complete with all that the stage reads.
        label: what stands before each caption, where the samples are others.
        images: the counts at which to paint.
    """

    def __init__(self, run: Path, ema: EMA, batch: Batch, label: str, images: list[int]):
        self.run, self.ema, self.batch, self.images = run, ema, batch, sorted(images)
        self.label = label

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(self.batch[module.writes], "truth")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = trainer.global_step * module.batch  # before a resumption, and painted then
        self.images = [n for n in self.images if n > seen]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        seen = trainer.global_step * module.batch
        if not any(n <= seen for n in self.images):
            return
        self.images = [n for n in self.images if n > seen]
        here = module.transfer_batch_to_device(self.batch, module.device, 0)
        with self.ema.applied(module):  # on all ranks, which would wait anyway
            pictures = module.sample(here, seed=0)
        if trainer.is_global_zero:
            self._save(pictures, f"{seen:010d}")

    def _save(self, pictures: torch.Tensor, name: str) -> None:
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        scale = max(1, 128 // pictures.shape[-1])  # a caption needs some width
        captions = [self.label + caption for caption in self.batch["caption"]]
        sheet = grid(to_uint8(pictures), 8, captions=captions, scale=scale)
        sheet.save(folder / f"{name}.png")
