"""What `cascade train` trains: a module with a loss and an optimizer.

It is a plain module, so that sampling never imports Lightning, which takes seconds.
`training.module.Training` is the LightningModule around it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from cascade.batch import Batch

FURTHER = "further."  # prefix of the names of parameters that training alone has


class Trainable(nn.Module, ABC):
    """A module with a loss and an optimizer.

    Args:
        optimizer: creates an optimizer for parameters, or for groups of them.
        learning_rate: factor of the learning rate after a number of images; None: constant.
        batch: global batch size, to count images.

    Attributes:
        further: losses that are attached for the training, by name. Neither an average that is
            exported nor the exported weights hold their parameters (`FURTHER`).
        terms: the means, in the last step, of the losses named in `columns`; None: switched off.
        done: the share of the training that is done.
    """

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        learning_rate: Callable[[int], float] | None = None,
        batch: int = 1,
    ):
        super().__init__()
        self.optimizer, self.learning_rate, self.batch = optimizer, learning_rate, batch
        self.further: Any = nn.ModuleDict()
        self.terms: dict[str, Tensor | None] = {}
        self.done = 0.0

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters(), torch.empty(0)).device

    @property
    def rank(self) -> int:
        """The number of this process among those that train together."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The losses whose course is reported beside that of their sum."""
        return tuple(self.further)

    @property
    def frozen(self) -> tuple[Any, ...]:
        """The encoders that it reads, whose weights no checkpoint holds; each has a `hash`."""
        return ()

    def encoded(self, batch: Batch) -> Batch:
        """Add what frozen encoders compute from the batch, if anything."""
        return batch

    @abstractmethod
    def training_step(self, batch: Batch, number: int) -> Float[Tensor, ""]:
        """The mean loss of an encoded batch."""

    def after_backward(self) -> None:
        """Called once the gradients are there."""

    def after_step(self) -> None:
        """Called after an optimizer step, before the average is updated."""

    def groups(self) -> Iterable[Any]:
        """The parameters to train, or groups of them with options of the optimizer."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule of its learning rate, as Lightning expects them."""
        optimizer = self.optimizer(self.groups())
        if (factor := self.learning_rate) is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step * self.batch)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @property
    def note(self) -> str:
        """A warning about weights that were loaded; usually empty."""
        return ""

    @abstractmethod
    def export(self, run: Path) -> None:
        """Write the current weights into a run directory. All ranks must call it."""

    @abstractmethod
    def restore(self, run: Path, of: str | None = None) -> None:
        """Load what `export` wrote. UserError if there is nothing, or if it does not fit.

        Args:
            of: what this module is, for the message; None: the run's own.
        """
