"""The LightningModule around whatever is trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from cascade.batch import Batch
from cascade.trainable import Trainable


class Training(L.LightningModule):
    """Trains a module, whose parameters and submodules it holds under the same names.

    State dicts, averages and optimizer states therefore look as if the module itself were trained.

    Args:
        module: a `Stage`, a `CLIPTraining` or an `AutoencoderTraining`.
    """

    def __init__(self, module: Trainable):
        super().__init__()
        self.__dict__["trained"] = module  # no submodule: that would prefix all names
        for own in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[own] = module.__dict__[own]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.trained.encoded(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.done = self.trainer.global_step / self.trainer.max_steps
        return self.trained.training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.trained.after_backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.trained.after_step()

    def configure_optimizers(self) -> Any:
        return self.trained.configure_optimizers()

    def configure_model(self) -> None:
        """Shards the parameters, if the strategy does so."""
        if divide := getattr(self.trainer.strategy, "divide", None):
            divide(self)

    def on_fit_start(self) -> None:
        if note := self.trained.note:  # a checkpoint was loaded
            rank_zero_only(print)(note)

    # FSDP2 gathers parameters around the methods that are called on this module.
    def measure(self, batches: Iterable[Batch]) -> None:
        self.trained.measure(batches)

    def sample(self, batch: Batch, seed: int) -> Tensor:
        return self.trained.sample(batch, seed)

    def export(self, run: Path) -> None:
        self.trained.export(run)
