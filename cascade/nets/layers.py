"""Layers that several networks share. Pictures are [b, c, h, w], sequences [b, n, w].

Activations that are cheap to recompute are not stored for the backward pass: a normalisation with
its SiLU stores its input alone, and whole blocks can be recomputed (`run`).
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Fourier
from cascade.diffusion.noise import Schedule, table, table_index
from cascade.errors import UserError


def run(net: nn.Module, block: nn.Module, *args: Any) -> Tensor:
    """Calls a block; if `net.checkpoint` is set, it is recomputed in the backward pass."""
    if net.checkpoint and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def altered(module: Any, **parts: Any) -> Any:
    """A copy of a module with the same parameters, and with other `parts` (submodules, options)."""
    other = copy.copy(module)
    other._modules = dict(module._modules)  # where submodules are registered
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def zero(module: nn.Module) -> nn.Module:
    """Zeroes all parameters of a module, so that its residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def convolve_enlarged(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
    """Enlarges twice by nearest neighbours, then applies a 3 x 3 convolution.

    Both are one transposed convolution with a 4 x 4 kernel, the sum of four shifted copies of the 3
    x 3 kernel, which takes 16 multiplications instead of 36.
    """
    k = conv.weight.flip(2, 3).transpose(0, 1)
    shifts = [(right, 1 - right, low, 1 - low) for right in (0, 1) for low in (0, 1)]
    kernel = sum(F.pad(k, shift) for shift in shifts)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def sinusoids(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b {dim}"]:
    """Cosines, then sines (ADM's order), of t at dim / 2 frequencies from 1 down to 1e-4."""
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angles = t[:, None] * torch.exp(-math.log(1e4) * exponents)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Timestep(nn.Module):
    """Sinusoids of the index of logsnr in a discrete process, as published networks read it.

    Args:
        dim: number of features; even.
        schedule: the schedule of the process.
        steps: number of levels in its table.
    """

    def __init__(self, dim: int, schedule: Schedule, steps: int = 1000):
        super().__init__()
        self.dim = dim
        self.register_buffer("levels", table(schedule, steps).float(), persistent=False)

    def forward(self, logsnr: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return sinusoids(table_index(logsnr.to(self.levels.dtype), self.levels), self.dim)


class LevelIndex(nn.Module):
    """Sinusoids of the index int(1000 level) of a corruption's level, as DeepFloyd IF reads it.

    Args:
        dim: number of features; even.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, level: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """`level` is scaled to 0 to 10, as a `Corruption` writes it."""
        # The 1e-3 keeps multiples of 1 / 1000, which float32 may round down, at their own index.
        return sinusoids((100 * level + 1e-3).floor(), self.dim)


class NoiseLevel(nn.Sequential):
    """The embedding of logsnr that each block reads: features, then two layers.

    Args:
        dim: size of the embedding.
        features: features of the level; None: Fourier features of logsnr itself.
        activation: between the layers; None: SiLU.
    """

    def __init__(
        self,
        dim: int,
        features: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        features = features or Fourier(dim)
        first, act = nn.Linear(features.dim, dim), activation or nn.SiLU()
        super().__init__(features, first, act, nn.Linear(dim, dim))


class ActivatedGroupNorm(torch.autograd.Function):
    """silu(((x - mean) rstd weight + bias) (1 + scale) + shift), storing only x for backward.

    The argument of the SiLU is x a + d, with a and d per channel; plain autograd stores three to
    five tensors of the size of x instead. This form also reads x few times, and is as fast
    channels-last. Small tensors have the shape [b, groups, channels of a group].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, modulation, groups, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.mean((2, 3), dtype=wide)
        # Deviations from each channel's own mean, so that large means lose no digits.
        spread = (x - own[:, :, None, None]).square_().mean((2, 3)).unflatten(1, (groups, -1))
        own = own.unflatten(1, (groups, -1))
        mean = own.mean(2, keepdim=True)
        rstd = ((spread + (own - mean).square()).mean(2, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, mean, rstd, weight, bias, modulation)
        a, d, _ = _affine(mean, rstd, weight, bias, modulation)
        return F.silu(torch.addcmul(d, x, a), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, mean, rstd, weight, bias, modulation = ctx.saved_tensors
        groups, n = mean.shape[1], x[0].numel() / mean.shape[1]
        a, d, k = _affine(mean, rstd, weight, bias, modulation)
        z = torch.addcmul(d, x, a)
        z = torch.ops.aten.silu_backward(gradient.to(z.dtype), z)
        of_d = z.sum((2, 3)).unflatten(1, (groups, -1))
        # With the mean held constant.
        of_a = (z * x).sum((2, 3)).unflatten(1, (groups, -1)) - of_d * mean
        weight, of_modulation = weight.unflatten(0, (groups, -1)), None
        scaled = weight * rstd
        if modulation is not None:
            of_k = of_a * scaled + of_d * bias.unflatten(0, (groups, -1))
            of_modulation = torch.cat([of_k.flatten(1), of_d.flatten(1)], 1).to(modulation.dtype)
            of_a, of_d = of_a * k, of_d * k
        slope = (of_a * weight).sum(2, keepdim=True) * rstd**3 * (-1 / n)
        level = (of_d * scaled).sum(2, keepdim=True) * (-1 / n) - slope * mean
        slope, level = (t.expand_as(of_d).reshape(*x.shape[:2], 1, 1) for t in (slope, level))
        of_x = torch.addcmul(level, x, slope).addcmul_(z, a).to(x.dtype)
        of_weight, of_bias = (of_a * rstd).sum(0).flatten(), of_d.sum(0).flatten()
        return of_x, of_weight, of_bias, of_modulation, None, None


def _affine(mean, rstd, weight, bias, modulation) -> tuple[Tensor, Tensor, Tensor | None]:
    """a and d [b, c, 1, 1], and 1 + scale [b, groups, channels of a group]."""
    groups, k = (mean.shape[1], -1), None
    a = weight.unflatten(0, groups) * rstd
    d = bias.unflatten(0, groups) - mean * a
    if modulation is not None:
        scale, shift = (half.unflatten(1, groups) for half in modulation.chunk(2, 1))
        k = 1 + scale
        a, d = a * k, d * k + shift
    return a.flatten(1)[:, :, None, None], d.flatten(1)[:, :, None, None], k


class GroupNorm(nn.GroupNorm):
    """Group normalisation.

    Args:
        channels: number of channels.
        groups: None: at least 8 channels per group and at most 32 groups. (Published: 32.)
        eps: added to the variance. (ADM 1e-5, DDPM 1e-6.)

    Raises:
        UserError: `groups` does not divide `channels`.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5):
        groups = groups or math.gcd(min(32, max(1, channels // 8)), channels)
        if channels % groups:
            raise UserError(
                f"{channels} channels are not a multiple of {groups} groups: change net.channels, "
                "net.multipliers or net.norm.groups"
            )
        super().__init__(groups, channels, eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """norm(x), without the rounding errors of torch's kernel where means are large.

        Channels-last on a CPU, torch computes the variance as the mean square minus the squared
        mean, which cancels. Subtracting each group's mean first changes neither the result nor the
        gradients.
        """
        groups = x.detach().mean((2, 3)).unflatten(1, (self.num_groups, -1))
        mean = groups.mean(2, keepdim=True).expand_as(groups).flatten(1)
        return super().forward(x - mean[:, :, None, None])

    def activated(
        self,
        x: Float[Tensor, "b c h w"],
        modulation: Float[Tensor, "b d"] | None = None,
        activation: nn.Module | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """silu(norm(x) (1 + scale) + shift), or another activation of it.

        `modulation` is [scale, shift], so d = 2 c.
        """
        if activation is None or isinstance(activation, nn.SiLU):
            return ActivatedGroupNorm.apply(
                x, self.weight, self.bias, modulation, self.num_groups, self.eps
            )
        h = self(x)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return activation(h)


class Positions(nn.Module):
    """Learned position embeddings: a linear map of sines and cosines of the coordinates.

    Coordinates run from -1 to 1 at every size of the picture, so that "on the left" always means
    the same.

    Args:
        channels: size of the embedding.
        octaves: number of periods, 4, 2, 1..., in each of the two directions.
    """

    def __init__(self, channels: int, octaves: int = 4):
        super().__init__()
        self.octaves = octaves
        self.project = nn.Linear(4 * octaves, channels)

    def forward(self, height: int, width: int) -> Float[Tensor, "c {height} {width}"]:
        device = self.project.weight.device
        sides = [(2 * torch.arange(n, device=device) + 1) / n - 1 for n in (height, width)]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
        frequencies = 0.5 * math.pi * 2.0 ** torch.arange(self.octaves, device=device)
        angles = (places[..., None] * frequencies).flatten(2)
        features = torch.cat([angles.cos(), angles.sin()], 2)
        return self.project(features.to(self.project.weight.dtype)).permute(2, 0, 1)
