"""What a person sees of a training: a progress bar, a table of metrics, grids of samples.

Progress is counted in images seen, so that runs with different batch sizes compare.
"""

import csv
import json
import time
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cascade.conditioning import Batch
from cascade.grids import grid, to_uint8
from cascade.training.ema import EMA


def bar(what: str, unit: str = "images") -> Progress:
    """A progress bar with counts, rate and time left, for any long step."""
    return Progress(
        TextColumn(f"[bold]{what:<12}"),
        BarColumn(bar_width=28),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=2,
    )


class History(L.Callback):
    """Writes loss, learning rate and images per second: progress bar, `metrics.csv`, TensorBoard.

    Args:
        run: the run's directory.
        name: the stage's name, shown beside the bar.
        total: images in all.
        every: optimizer steps between two rows.
    """

    COLUMNS = ("images", "loss", "lr", "images_per_second", "seconds")

    def __init__(self, run: Path, name: str, total: int, every: int = 20):
        self.run, self.name, self.total, self.every = run, name, total, every
        self.losses: list[torch.Tensor] = []
        self.step, self.seconds = 0, 0.0
        self.skipped: Counter[str] = Counter()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step, self.mark = trainer.global_step, time.monotonic()
        if not trainer.is_global_zero:
            return
        images = self.step * module.batch
        path = self.run / "metrics.csv"
        rows = []
        if path.exists():  # a resumed run goes on after its checkpoint
            with path.open() as file:
                rows = [r for r in csv.DictReader(file) if int(r["images"]) <= images]
            self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        self.file = path.open("w", newline="")
        self.table = csv.DictWriter(self.file, self.COLUMNS)
        self.table.writeheader()
        self.table.writerows(rows)
        self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=images)
        self.bar = bar(self.name)
        self.task = self.bar.add_task("", total=self.total, completed=images, rate=0, note="")
        self.bar.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].detach())
        self.skipped.update(batch.get("skipped", {}))
        steps = trainer.global_step - self.step
        last = trainer.global_step == trainer.max_steps
        if steps == 0 or (steps % self.every and not last):
            return
        loss = torch.stack(self.losses).mean().item() * trainer.accumulate_grad_batches
        now = time.monotonic()
        rate = steps * module.batch / (now - self.mark)
        self.seconds += now - self.mark
        self.losses, self.step, self.mark = [], trainer.global_step, now
        if trainer.is_global_zero:
            images = trainer.global_step * module.batch
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            values = (images, f"{loss:.5g}", f"{lr:.4g}", f"{rate:.1f}", f"{self.seconds:.1f}")
            self.table.writerow(dict(zip(self.COLUMNS, values)))
            self.file.flush()
            for key, value in (("loss", loss), ("lr", lr), ("images_per_second", rate)):
                self.board.add_scalar(key, value, images)
            self.bar.update(self.task, completed=images, rate=rate, note=f"loss {loss:.4f}")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()
            self.board.close()
            self.file.close()
            if self.skipped:
                counts = ", ".join(f"{n} {reason}" for reason, n in self.skipped.most_common())
                print(f"{self.name}: bad samples, replaced by the next good ones: {counts}")
                (self.run / "skipped.json").write_text(json.dumps(self.skipped) + "\n")

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self.skipped = Counter(state["skipped"])


class SampleGrids(L.Callback):
    """Paints the same held-out batch over the course of the training, with the average's weights.

    Args:
        run: the run's directory; the grids are `samples/{images}.png`, and the truth `truth.png`.
        ema: the average.
        batch: of held-out samples, complete with all that the stage reads.
        images: the counts at which to paint.
    """

    def __init__(self, run: Path, ema: EMA, batch: Batch, images: list[int]):
        self.run, self.ema, self.batch, self.images = run, ema, batch, sorted(images)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(self.batch[module.writes], "truth")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = trainer.global_step * module.batch  # before a resumption, and painted then
        self.images = [n for n in self.images if n > seen]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        seen = trainer.global_step * module.batch
        due = [n for n in self.images if n <= seen]
        if not due or not trainer.is_global_zero:
            return
        self.images = [n for n in self.images if n > seen]
        here = module.transfer_batch_to_device(self.batch, module.device, 0)
        with self.ema.applied(module):
            self._save(module.sample(here, seed=0), f"{seen:010d}")

    def _save(self, pictures: torch.Tensor, name: str) -> None:
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        scale = max(1, 128 // pictures.shape[-1])  # a caption needs some width
        sheet = grid(to_uint8(pictures), 8, captions=self.batch["caption"], scale=scale)
        sheet.save(folder / f"{name}.png")
