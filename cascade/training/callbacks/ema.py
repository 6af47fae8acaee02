"""Exponential moving average of the trained parameters, in float32.

decay_t = min(decay, (1 + t) / (10 + t)): a constant 0.9999 would keep 92 % of the initial weights
after 785 steps.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from torch import Tensor, nn

from cascade.batch import Batch
from cascade.nets.dtensors import placed, whole
from cascade.trainable import FURTHER

Average = dict[str, Tensor]  # of each trained parameter, by name


def begun(average: Average, module: nn.Module) -> Average:
    """Returns an average, where it is to be updated; an empty one begins with the parameters."""
    named = module.named_parameters()
    now = {k: p for k, p in named if p.requires_grad and not k.startswith(FURTHER)}
    average = average or {k: p.detach().float().clone() for k, p in now.items()}
    return {k: placed(a, now[k]) for k, a in average.items()}


def move(average: Average, module: nn.Module, decay: float) -> None:
    """Sets an average to decay times itself plus 1 - decay times the parameters."""
    parameters = dict(module.named_parameters())
    values = [parameters[k].detach().float() for k in average]
    torch._foreach_lerp_(list(average.values()), values, 1 - decay)


class EMA(L.Callback):
    """Updates the average after each optimizer step; the average is part of the checkpoint.

    A step that `Guard` skipped, by removing the gradients, does not count.

    Args:
        decay: the greatest decay per step.
    """

    def __init__(self, decay: float = 0.9999):
        self.decay = decay
        self.step = 0
        self.average: Average = {}
        self.swapped = False
        self._stepped = False

    def on_fit_start(self, trainer, module: nn.Module) -> None:
        self.average = begun(self.average, module)

    def on_before_optimizer_step(self, trainer, module: nn.Module, optimizer) -> None:
        self._stepped = any(p.grad is not None for p in module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not self._stepped:
            return  # this micro-batch only accumulated gradients, or the step was skipped
        self._stepped = False
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        move(self.average, module, decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swap the average into the module, in `eval()` mode, for the duration of the context."""
        parameters = dict(module.named_parameters())
        trained = {k: parameters[k].detach().clone() for k in self.average}
        training = module.training
        try:
            self.swapped = True
            self._copy(self.average, parameters)
            module.eval()
            yield
        finally:
            self._copy(trained, parameters)
            module.train(training)
            self.swapped = False

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
        for name, value in source.items():
            parameters[name].copy_(value)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        if self.swapped:
            raise RuntimeError("a checkpoint must not be written while the average is swapped in")

    def state_dict(self) -> dict:
        return {"step": self.step, "average": whole(self.average)}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.average = state["step"], state["average"]


class Measure(L.Callback):
    """Calls `module.measure` with the averaged weights after the last step, before it is saved.

    A process may so measure the trained network (Analytic-DPM's variances).

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
