"""Pictures larger than a network's own size, denoised in overlapping windows of that size.

The networks' outputs are blended (MultiDiffusion, 2302.08113). At one noise level x0_hat is affine
in the output, so this blends the denoised pictures too.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond


def starts(length: int, size: int, multiple: int) -> list[int]:
    """Where windows begin along a side: at multiples, evenly, overlapping by half or more."""
    count = math.ceil(2 * (length - size) / size) + 1
    last = max(1, count - 1)
    return sorted({round(i * (length - size) / last / multiple) * multiple for i in range(count)})


class Windows(nn.Module):
    """A network for larger pictures than its own.

    Each window sees its own part of a condition's picture; everything else of the condition, such
    as the caption, holds for all of them.

    Args:
        net: the network, and `divisor`, which its sides are multiples of.
        size: its own side, in pixels. The sides of larger pictures are at least that, and multiples
            of `divisor`.
    """

    def __init__(self, net: nn.Module, size: int):
        super().__init__()
        self.net, self.size, self.divisor = net, size, net.divisor

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b d h w"]:
        size, sides = self.size, x.shape[2:]
        ramp = (torch.arange(size, device=x.device) + 0.5 - size / 2).abs()
        weight = torch.outer(*[(size + 1) / 2 - ramp] * 2)
        out, total = 0.0, x.new_zeros(sides)
        for top in starts(sides[0], size, self.divisor):
            for left in starts(sides[1], size, self.divisor):
                window = (..., slice(top, top + size), slice(left, left + size))
                some = cond
                if cond.image is not None and cond.image.shape[2:] == sides:
                    some = replace(cond, image=cond.image[window])
                F = self.net(x[window], logsnr, some)
                if isinstance(out, float):
                    out = F.new_zeros(*F.shape[:2], *sides)
                out[window] += weight.to(F) * F
                total[window] += weight.to(total)
        return out / total.to(out)


class Enlarged(nn.Module):
    """A codec of pictures with other sides than its own.

    Args:
        codec: of square pictures.
        sides: height and width, in pixels.
    """

    def __init__(self, codec: nn.Module, sides: tuple[int, int]):
        super().__init__()
        self.codec, self.sides = codec, sides
        self.writes = codec.writes

    def encode(self, batch: dict) -> Tensor:
        return self.codec.encode(batch)

    def decode(self, x0: Tensor) -> Tensor:
        return self.codec.decode(x0)

    def shape(self, batch: dict) -> tuple[int, ...]:
        return *self.codec.shape(batch)[:1], *self.sides
