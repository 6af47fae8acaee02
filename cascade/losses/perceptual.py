"""A perceptual loss: the denoised picture shall look like the clean one to a frozen network.

Squared errors of pixels are least for blurred pictures; features of a network penalise that. The
network must not be the one that judges the samples.
"""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.batch import Batch, image_size
from cascade.diffusion.gaussian import per_sample
from cascade.errors import UserError
from cascade.losses.watched import Call


@runtime_checkable
class Distance(Protocol):
    """A frozen distance between pictures, such as `LPIPS`."""

    def to(self, device: torch.device) -> "Distance": ...

    def __call__(self, one: Tensor, other: Tensor) -> Float[Tensor, " b"]: ...


class Perceptual(nn.Module):
    """`weight` times the distance of x0_hat from x0, at noise levels that leave something to see.

    Args:
        teacher: the distance.
        weight: of this loss.
        least: the least logsnr at which it applies.
        until: share of the training after which it is switched off.
    """

    def __init__(
        self,
        teacher: Distance,
        weight: float = 0.1,
        least: float = -math.inf,
        until: float = 1.0,
    ):
        super().__init__()
        self.teacher: Any = teacher
        self.watched: tuple[Any, ...] = ()
        self.weight, self.least, self.until = weight, least, until

    def attached(self, stage: Any) -> "Perceptual":
        """Returns itself.

        Args:
            stage: a `Stage`, or what trains an autoencoder.

        Raises:
            UserError: the stage samples no pictures, or its process has no prediction of x0.
        """
        if not image_size(stage.writes):
            raise UserError(f"perceptual: {stage.writes} is no picture: leave perceptual= out")
        if getattr(getattr(stage, "codec", None), "frozen", ()):
            raise UserError(
                "perceptual: it compares pictures, but this stage diffuses latents: give it to "
                "stage=autoencoder"
            )
        if hasattr(stage, "process") and not hasattr(stage.process, "prediction"):
            raise UserError(
                f"perceptual: {type(stage.process).__name__} gives no x0 to compare: choose a "
                "process without a learned variance, or leave perceptual= out"
            )
        _ = self.teacher.hash  # or there is no file
        return self

    def active(self, done: float) -> bool:
        """Whether it is on once this share of the training is done."""
        return done < self.until

    def forward(self, stage: Any, batch: Batch, x0: Tensor, call: Call) -> Float[Tensor, " b"]:
        found = x0.new_zeros(len(x0))
        rows = call.logsnr >= self.least
        if not self.active(stage.done) or not rows.any():
            return found
        x, logsnr, output = call.x[rows], call.logsnr[rows], call.output[rows]
        c_in, c_skip, c_out = stage.process.prediction(logsnr.double())
        x0_hat = per_sample(c_skip / c_in, x) * x + per_sample(c_out, x) * output
        apart = self.between(x0_hat, x0[rows])
        return found.index_put((rows,), apart.to(found.dtype))

    def between(self, one: Tensor, other: Tensor) -> Float[Tensor, " b"]:
        """`weight` times the distance of pictures."""
        return self.weight * self.teacher.to(one.device)(one, other)
