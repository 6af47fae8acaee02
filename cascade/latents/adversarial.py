"""The patch-adversarial loss of autoencoders (VQGAN, 2012.09841, section 3.1).

A discriminator judges patches of pictures, true or reconstructed (PatchGAN, 1611.07004). One
backward pass trains both sides: the discriminator's loss has gradients for the discriminator alone,
and the autoencoder's for the autoencoder alone. So one optimizer with two groups of parameters
serves both, and one checkpoint holds its state. (`gradient_clip` bounds the norm of both gradients
together.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from cascade.errors import UserError
from cascade.nets.layers import GroupNorm


class Scores(NamedTuple):
    """What an adversarial loss gives: the part of the autoencoder, and the discriminator's own."""

    deceived: Float[Tensor, ""]
    discriminator: Float[Tensor, ""]


class Discriminator(nn.Sequential):
    """Scores overlapping patches of pictures; high ones are taken for true.

    Args:
        channels: of the first layer; each of the next two doubles them.
        layers: how often it halves the resolution, before two further layers. A score depends on
            16, 34 or 70 pixels for 1, 2 or 3.
    """

    def __init__(self, channels: int, layers: int):
        found: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        c = channels
        for i in range(1, layers + 1):
            width = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            found += [nn.Conv2d(c, width, 4, stride, 1), GroupNorm(width), nn.LeakyReLU(0.2)]
            c = width
        super().__init__(*found, nn.Conv2d(c, 1, 4, 1, 1))

    def fixed(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 i j"]:
        """The scores, with gradients to the pictures alone."""
        state = {name: p.detach() for name, p in self.named_parameters()}
        return functional_call(self, state, (x,))


def hinge(true: Float[Tensor, "b 1 i j"], false: Float[Tensor, "b 1 i j"]) -> Float[Tensor, ""]:
    """The discriminator's loss (1705.02894): true scores shall exceed 1, others fall below -1."""
    return (F.relu(1 - true).mean() + F.relu(1 + false).mean()) / 2


class Adversarial(nn.Module):
    """Trains an autoencoder to deceive a discriminator, and the discriminator with it.

    The weight follows the gradients of the last layer, so that this loss pulls as hard as all
    others together, times `weight` (equation 7).

    Args:
        weight: of this loss.
        start: share of the training after which it is switched on.
        channels, layers: of the discriminator.
    """

    MOST = 1e4  # of the factor that balances gradients

    def __init__(
        self, weight: float = 0.5, start: float = 0.5, channels: int = 64, layers: int = 3
    ):
        super().__init__()
        self.weight, self.start = weight, start
        self.discriminator = Discriminator(channels, layers)

    def attached(self, module: nn.Module) -> "Adversarial":
        """Returns itself. UserError if the module reconstructs no pictures."""
        if not hasattr(module, "reconstructed"):
            raise UserError("adversarial: only stage=autoencoder has this loss: leave it out")
        return self

    def active(self, done: float) -> bool:
        """Whether it is on once this share of the training is done."""
        return done >= self.start

    def forward(
        self,
        x: Float[Tensor, "b 3 h w"],
        y: Float[Tensor, "b 3 h w"],
        others: Float[Tensor, ""],
        last: nn.Parameter,
    ) -> Scores:
        """Judges pictures and their reconstructions.

        Args:
            others: the sum of the autoencoder's other losses.
            last: the weights of its last layer.
        """
        deceived = -self.discriminator.fixed(y).mean()
        own = hinge(self.discriminator(x), self.discriminator(y.detach()))
        return Scores(self.weight * balance(others, deceived, last) * deceived, own)

    def idle(self) -> Float[Tensor, ""]:
        """Zero, with a gradient for each parameter, as DDP expects."""
        return 0 * sum(p.sum() for p in self.parameters())


def balance(
    others: Float[Tensor, ""], deceived: Float[Tensor, ""], last: nn.Parameter
) -> Float[Tensor, ""]:
    """The ratio of two losses' gradients of a layer (2012.09841, equation 7), without gradients."""
    if not deceived.requires_grad:
        return torch.zeros_like(deceived)
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (others, deceived)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=Adversarial.MOST).detach()
