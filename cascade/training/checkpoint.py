"""Checkpoints that are whole or not there, and what a finished run leaves behind.

`checkpoints/step-00000123.ckpt` holds all that resuming needs, in plain dictionaries; `status.json`
says how far the run is. Both are written beside their place, flushed to disk and renamed.
"""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from cascade.files import write_atomically
from cascade.training.ema import EMA


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's own moves a file from TMPDIR, which is a copy over the old one on clusters."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        write_atomically(Path(path), lambda beside: torch.save(checkpoint, beside))

    def load_checkpoint(self, path, map_location=None, weights_only=True) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


def newest_checkpoint(run: Path) -> tuple[Path, int] | None:
    """The newest readable checkpoint of a run and its optimizer step; None if there is none."""
    for path in sorted((run / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            return path, torch.load(path, map_location="meta", weights_only=True)["global_step"]
        except Exception as error:  # damaged in any way: the one before it serves
            print(f"{path} cannot be read ({type(error).__name__}); the one before it is used")
    return None


class Checkpoints(L.Callback):
    """Saves every `seconds`, and at the end; keeps the last two, and exports the average each time.

    Args:
        run: the run's directory.
        ema: the average, which is exported to the run's directory.
        total: images in all, for `status.json`.
        seconds: between two checkpoints.
    """

    def __init__(self, run: Path, ema: EMA, total: int, seconds: float = 120):
        self.run, self.ema, self.total, self.seconds = run, ema, total, seconds
        self.saved_at, self.saved_step = time.monotonic(), -1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        due = (
            time.monotonic() - self.saved_at > self.seconds
            and trainer.global_step > self.saved_step
        )
        if trainer.strategy.broadcast(due):
            self.save(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        if trainer.global_step > self.saved_step:
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        folder = self.run / "checkpoints"
        trainer.save_checkpoint(folder / f"step-{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            with self.ema.applied(module):
                module.export(self.run)
            status = {"images": trainer.global_step * module.batch, "total": self.total}
            write_atomically(
                self.run / "status.json", lambda p: p.write_text(json.dumps(status) + "\n")
            )
            for old in sorted(folder.glob("step-*.ckpt"))[:-2]:
                old.unlink()
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step


def finished(run: Path) -> bool:
    """Whether a run has seen all its images."""
    status = run / "status.json"
    if not status.exists():
        return False
    counts = json.loads(status.read_text())
    return counts["images"] >= counts["total"]
