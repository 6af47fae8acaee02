"""ControlNets: trained copies of a U-Net's way down, which steer the frozen network by a picture.

A copy reads what the network reads and a picture of a condition, such as edges. Its outputs are
added to the network's skip connections and middle through convolutions that start at zero, so that
training begins with the network's own outputs (2302.05543, section 3.1).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets.layers import zero


class ControlNet(nn.Module):
    """What a picture of a condition adds to a network's skip connections and middle.

    The picture is folded to the resolution of the network's first convolution, embedded by two
    layers, and added to the output of that convolution (section 3.2).

    Args:
        net: the U-Net to steer, or a network around one (`Residual`, `ByLevel`). It is copied.
        size: side of the condition's picture, in pixels.
        side: of the pictures that the network paints, in pixels.
        width: channels of the picture's embedding.

    Raises:
        UserError: `net` is no U-Net, or the sides do not fit.
    """

    def __init__(self, net: nn.Module, size: int, side: int, width: int = 64):
        super().__init__()
        net = unet_of(net)
        self.fold, rest = divmod(size * net.patch, side)
        if rest or not self.fold:
            raise UserError(
                f"control.size={size}: give a multiple of {side // net.patch} px, the resolution "
                "of the network's first convolution"
            )
        self.size = size
        # Without the way up, which `deepcopy` takes for copied already.
        self.net = copy.deepcopy(net, {id(getattr(net, name)): None for name in net.WAY_UP})
        first = net.conv_in.out_channels
        self.embed = nn.Sequential(
            nn.Conv2d(3 * self.fold**2, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            zero(nn.Conv2d(width, first, 1)),
        )
        self.joins = nn.ModuleList(zero(nn.Conv2d(c, c, 1)) for c in net.joins)

    def begin(self, net: nn.Module) -> None:
        """Copies the weights of the network that it was made for."""
        own = self.net.state_dict()
        self.net.load_state_dict({k: v for k, v in unet_of(net).state_dict().items() if k in own})

    def hint(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h0 w0"]:
        """The embedding of a condition's picture in [-1, 1], which is the same at every step."""
        x = F.pixel_unshuffle(picture, self.fold)
        return self.embed(x.contiguous(memory_format=torch.channels_last))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, " b"],
        cond: Cond,
        hint: Float[Tensor, "b c0 h0 w0"],
    ) -> tuple[Tensor, ...]:
        """What is added to each skip connection, and to the middle."""
        _, *found = self.net.encoded(x, logsnr, cond, hint)
        return tuple(join(h) for join, h in zip(self.joins, found))


def unet_of(net: nn.Module) -> Any:
    """The U-Net itself, or inside a network around it. UserError if there is none."""
    inner = net
    while not hasattr(inner, "joins"):
        if not isinstance(inner := getattr(inner, "net", None), nn.Module):
            raise UserError(f"control: {type(net).__name__} is no U-Net, so it cannot be steered")
    return inner


@dataclass(frozen=True)
class Steering:
    """A ControlNet with the embedding of b pictures, and the weight of each."""

    control: ControlNet
    hint: Float[Tensor, "b c h w"]
    weight: Float[Tensor, " b"]

    def __call__(
        self, x: Float[Tensor, "n c h w"], logsnr: Float[Tensor, " n"], cond: Cond
    ) -> list[Tensor]:
        branches = len(x) // len(self.hint)  # both of guidance may come in one call
        weight = self.weight.repeat(branches)[:, None, None, None]
        added = self.control(x, logsnr, cond, self.hint.repeat(branches, 1, 1, 1))
        return [weight * h for h in added]


@dataclass(frozen=True)
class Steered:
    """A network that ControlNets steer; what they add is summed (section 3.4)."""

    net: Any
    by: Sequence[Steering]

    def __call__(
        self, x: Float[Tensor, "n c h w"], logsnr: Float[Tensor, " n"], cond: Cond
    ) -> Float[Tensor, "n d h w"]:
        each = [steering(x, logsnr, cond) for steering in self.by]
        return self.net(x, logsnr, replace(cond, added=tuple(map(sum, zip(*each)))))
