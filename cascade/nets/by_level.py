"""A network that changes with the noise level."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.diffusion.noise import Schedule, table, table_index


class ByLevel(nn.Module):
    """One network, and for the cleanest level of a table another of the same shape.

    Karlo's super-resolution takes its last step, at index 0, with a network of its own
    (kakaobrain/karlo, sr_64_256.py). In training both see each batch, so that all parameters get a
    gradient on every rank.

    Args:
        net: the network for all other levels.
        schedule: of the process.
        steps: number of levels in its table.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, steps: int = 1000):
        super().__init__()
        self.net, self.last = net, copy.deepcopy(net)
        self.divisor, self.image_channels = net.divisor, net.image_channels
        self.embed, self.width = net.embed, net.width
        self.register_buffer("levels", table(schedule, steps).float(), persistent=False)

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        is_last = table_index(logsnr.to(self.levels.dtype), self.levels) < 0.5
        if not self.training and is_last.all():
            return self.last(x, logsnr, cond)
        if not self.training and not is_last.any():
            return self.net(x, logsnr, cond)
        is_last = is_last[:, None, None, None]
        return torch.where(is_last, self.last(x, logsnr, cond), self.net(x, logsnr, cond))
