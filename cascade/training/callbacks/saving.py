"""Saves checkpoints, and with each the averaged weights and the status that others read."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError

from cascade.errors import Failed, Superseded, TryAgain
from cascade.files.atomic import REST, remove, remove_rests
from cascade.runs.run import Position, Run, event
from cascade.training.callbacks.ema import EMA
from cascade.training.checkpoint import newest_checkpoint, set_batches_done


class Checkpoints(L.Callback):
    """Saves at the end and on request; keeps the last two, and exports the average each time.

    Runs last of all callbacks: the others' output for a step is then already written when its
    checkpoint is, and a run that dies before resumes from the previous checkpoint and writes that
    output again. `Interruption` decides when to save.

    Args:
        run: the run's directory.
        ema: the average, whose weights are exported to the run's directory.
        start: where this process starts or resumes.
        total: images in all, for `status.json`.
        seconds: between two checkpoints.
    """

    def __init__(self, run: Path, ema: EMA, start: Position, total: int, seconds: float = 120):
        self.run, self.ema, self.start = run, ema, start
        self.total, self.seconds = total, seconds
        self.saved_step = start.step
        self.saved_at = time.monotonic()

    def setup(self, trainer, module, stage: str) -> None:
        # Network disks may show the newest checkpoint to one machine later than to another.
        here = torch.tensor(self.start.step, device=trainer.strategy.root_device)
        if (trainer.strategy.all_gather(here) != here).any():
            raise TryAgain(
                f"{self.run}: ranks see different checkpoints, this one step {self.start.step}"
            )

    def on_train_start(self, trainer, module) -> None:
        self.saved_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        run = Run(self.run)
        remove_rests(self.run)
        remove_rests(run.checkpoint_folder)
        name = "resumed" if self.start.step else "started"
        event(self.run, name, **self._position(trainer))
        for _, path in run.checkpoints():
            if path > run.checkpoint(self.start.step):  # damaged, or rolled back
                event(self.run, "set aside", checkpoint=path.name)
                os.replace(path, path.with_name(f".{path.name}{REST}"))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == trainer.max_steps:
            self.save(trainer, module)

    @property
    def due(self) -> bool:
        """Whether the next checkpoint is due, by this rank's clock."""
        return time.monotonic() - self.saved_at > self.seconds

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the last step, unless it is already saved. All ranks must call it together.

        Raises:
            Failed: on all ranks; the checkpoint could not be written. Earlier ones are untouched.
            Superseded: on all ranks; another process has taken over the run.
        """
        if trainer.global_step == self.saved_step:
            return
        run = Run(self.run)
        began, path = time.monotonic(), run.checkpoint(trainer.global_step)
        # Average and status first: a run killed right after its last checkpoint has no step left
        # to take, and so would never write them.
        failure = self._publish(trainer, module)
        trainer.save_checkpoint(path)
        failure = failure or trainer.strategy.checkpoint_io.failure
        if error := trainer.strategy.broadcast(failure and self._error(failure)):
            raise error
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            remove_rests(run.checkpoint_folder)
            for old in run.checkpoints()[:-2]:
                remove(old.path)
            seconds = round(self.saved_at - began, 3)
            event(self.run, "checkpoint", **self._position(trainer), seconds=seconds)
            if (images := self.start.at(trainer.global_step).images) >= self.total:
                event(self.run, "finished", images=images)

    def _publish(self, trainer, module) -> Exception | None:
        try:
            with self.ema.applied(module):
                module.export(self.run)
            if trainer.is_global_zero:
                Run(self.run).write_status(self.start.at(trainer.global_step).images, self.total)
        except (OSError, SafetensorError) as error:
            return error
        return None

    def _error(self, failure: Exception) -> Failed | Superseded:
        if isinstance(failure, Superseded):
            return failure
        last = newest_checkpoint(self.run)
        kept = f"{last.path} is intact" if last else "there is no other"
        what = f"a checkpoint could not be written ({failure})"
        return Failed(f"{self.run}: {what}; {kept}: make room and start again")

    def _position(self, trainer) -> dict[str, int]:
        """Return the run's position as manifests and events record it."""
        now = self.start.at(trainer.global_step)
        position = {"step": now.step, "images": now.images, "consumed": now.consumed}
        return {**position, "offset": now.offset, "ranks": trainer.world_size}

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self._position(trainer)
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])  # plain instead of ordered

    def on_load_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        steps = checkpoint["position"]["step"]
        set_batches_done(checkpoint, steps * trainer.accumulate_grad_batches)
