"""Pieces that several networks share. Pictures are [b, c, h, w], sequences [b, n, w].

What costs little to make again is not kept for backward: a normalisation with its SiLU keeps its
input alone, and all within a block can be made again (`run`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Fourier
from cascade.diffusion.noise import Schedule, table, table_index
from cascade.errors import UserError


def run(net: nn.Module, block: nn.Module, *args: Any) -> Tensor:
    """block(*args); where `net.checkpoint` is set, backward keeps its arguments alone."""
    if net.checkpoint and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def zero(module: nn.Module) -> nn.Module:
    """The same module with all parameters zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def convolve_enlarged(conv: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
    """conv(x enlarged twice by nearest neighbours), for a 3 x 3 convolution, in 16 products for 36.

    Both together are one transposed convolution: four kernels, shifted by a pixel, overlap.
    """
    k = conv.weight.flip(2, 3).transpose(0, 1)
    shifts = [(right, 1 - right, low, 1 - low) for right in (0, 1) for low in (0, 1)]
    kernel = sum(F.pad(k, shift) for shift in shifts)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def sinusoids(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b {dim}"]:
    """Cosines, then sines, of t at dim / 2 frequencies from 1 down to 1e-4 (ADM's order)."""
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angles = t[:, None] * torch.exp(-math.log(1e4) * exponents)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Timestep(nn.Module):
    """Sinusoids of the index of logsnr in a discrete process, which published networks are told.

    Args:
        dim: number of features; even.
        schedule: that of the process.
        steps: of the table.
    """

    def __init__(self, dim: int, schedule: Schedule, steps: int = 1000):
        super().__init__()
        self.dim = dim
        self.register_buffer("levels", table(schedule, steps).float(), persistent=False)

    def forward(self, logsnr: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return sinusoids(table_index(logsnr.to(self.levels.dtype), self.levels), self.dim)


class NoiseLevel(nn.Sequential):
    """The embedding of logsnr that each block is told: features, then two layers.

    Args:
        dim: of the embedding.
        features: of the level; None: Fourier features of logsnr itself.
    """

    def __init__(self, dim: int, features: Timestep | None = None):
        first = nn.Linear(features.dim if features else dim, dim)
        super().__init__(features or Fourier(dim), first, nn.SiLU(), nn.Linear(dim, dim))


class ActivatedGroupNorm(torch.autograd.Function):
    """silu(((x - mean) rstd weight + bias) (1 + scale) + shift), of which only x is kept.

    All before the SiLU is x a + d, with a and d of each channel; plain autograd keeps three to five
    pictures on the way. Pictures are read few times, and channels-last as fast as otherwise. What
    is small has the shape [b, groups, channels of a group].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, modulation, groups, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.mean((2, 3), dtype=wide)
        # Each channel about its own mean first: nothing cancels where means are large.
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
        of_a = (z * x).sum((2, 3)).unflatten(1, (groups, -1)) - of_d * mean  # at a constant mean
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
        channels: of the picture.
        groups: None: at least 8 channels a group and at most 32 groups. (Published: 32.)
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
        """norm(x), of which torch's own, channels-last on a CPU, loses the digits of a large mean.

        It forms the variance as the mean square less the squared mean. A level that is common to a
        group changes neither result nor gradients, so each group's mean is taken away first.
        """
        groups = x.detach().mean((2, 3)).unflatten(1, (self.num_groups, -1))
        mean = groups.mean(2, keepdim=True).expand_as(groups).flatten(1)
        return super().forward(x - mean[:, :, None, None])

    def activated(
        self, x: Float[Tensor, "b c h w"], modulation: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """silu(norm(x) (1 + scale) + shift), where `modulation` is [scale, shift] of d = 2 c."""
        return ActivatedGroupNorm.apply(
            x, self.weight, self.bias, modulation, self.num_groups, self.eps
        )


def split_heads(x: Float[Tensor, "b n w"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys or values that were projected in one: `parts` of [b, heads, n, ...]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def number_of_heads(width: int, head_channels: int) -> int:
    """How many heads of so many channels.

    Raises:
        UserError: they do not divide the width.
    """
    if width % head_channels:
        raise UserError(
            f"{width} channels are not a multiple of head_channels={head_channels}: "
            "change net.head_channels, net.channels or net.multipliers"
        )
    return width // head_channels


class Attention(nn.Module):
    """Self-attention, to which the condition's tokens are joined as further keys and values.

    GLIDE (section 2.1) and Imagen (appendix B): one softmax over the sequence and the text.

    Args:
        channels: width of the sequence.
        head_channels: channels per head.
        width: width of the condition's tokens; None if there are none.
        inner: width of queries, keys and values; None: `channels`.

    Raises:
        UserError: `head_channels` does not divide `inner`.
    """

    def __init__(
        self, channels: int, head_channels: int, width: int | None = None, inner: int | None = None
    ):
        super().__init__()
        inner = inner or channels
        self.heads = number_of_heads(inner, head_channels)
        self.qkv = nn.Linear(channels, 3 * inner)
        self.kv = nn.Linear(width, 2 * inner) if width else None
        self.out = zero(nn.Linear(inner, channels))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        tokens: Float[Tensor, "b m w"] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        if self.kv is not None and tokens is not None:
            more_k, more_v = split_heads(self.kv(tokens), 2, self.heads)
            k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
            mask = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
        else:
            mask = None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the condition's tokens alone, as a layer of its own (Imagen's 1024 px network).

    Each place is treated by itself, so that a network stays fully convolutional.

    Args:
        channels: width of the sequence.
        head_channels: channels per head.
        width: width of the condition's tokens.
        inner: width of queries, keys and values; None: `channels`.

    Raises:
        UserError: `head_channels` does not divide `inner`.
    """

    def __init__(self, channels: int, head_channels: int, width: int, inner: int | None = None):
        super().__init__()
        inner = inner or channels
        self.heads = number_of_heads(inner, head_channels)
        self.q = nn.Linear(channels, inner)
        self.kv = nn.Linear(width, 2 * inner)
        self.out = zero(nn.Linear(inner, channels))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        tokens: Float[Tensor, "b m w"],
        mask: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "b n c"]:
        (q,) = split_heads(self.q(x), 1, self.heads)
        k, v = split_heads(self.kv(tokens), 2, self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over a sequence, which attends to itself or to a context.

    Args:
        width: of the sequence, and of the context.
        heads: of the attention.

    Raises:
        UserError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads do not divide a width of {width}: change heads")
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = zero(nn.Linear(width, width))
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), zero(nn.Linear(4 * width, width))
        )

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        allowed: Bool[Tensor, "b 1 #n m"],
        context: Float[Tensor, "b m w"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """The sequence, transformed.

        Args:
            allowed: true where a position may attend to another.
            context: what is attended to, already normalised; None: x itself.
        """
        normed = self.norm_attention(x)
        (q,) = split_heads(self.q(normed), 1, self.heads)
        k, v = split_heads(self.kv(normed if context is None else context), 2, self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Positions(nn.Module):
    """A learned function of the place in a picture, of the sines and cosines of its coordinates.

    Coordinates run from -1 to 1 whatever the size of the picture, so that "on the left" means the
    same at every size.

    Args:
        channels: of the result.
        octaves: periods of 4, 2, 1... in each of the two directions.
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
