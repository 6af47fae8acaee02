"""Pieces that several networks share. Pictures are [b, c, h, w], sequences [b, n, w]."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.conditioning import Fourier


def zero(module: nn.Module) -> nn.Module:
    """The same module with all parameters zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class NoiseLevel(nn.Sequential):
    """The embedding of logsnr that each block is told: Fourier features, then two layers."""

    def __init__(self, dim: int):
        super().__init__(Fourier(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class GroupNorm(nn.GroupNorm):
    """Group normalisation, at least 8 channels a group and at most 32 groups."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(min(32, max(1, channels // 8)), channels), channels)


def split_heads(x: Float[Tensor, "b n w"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys or values that were projected in one: `parts` of [b, heads, n, ...]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    """Self-attention, to which the condition's tokens are joined as further keys and values.

    GLIDE (section 2.1) and Imagen (appendix B): one softmax over the sequence and the text.

    Args:
        channels: width of the sequence.
        head_channels: channels per head.
        width: width of the condition's tokens; None if there are none.
    """

    def __init__(self, channels: int, head_channels: int, width: int | None = None):
        super().__init__()
        self.heads = channels // head_channels
        self.qkv = nn.Linear(channels, 3 * channels)
        self.kv = nn.Linear(width, 2 * channels) if width else None
        self.out = zero(nn.Linear(channels, channels))

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


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over a sequence, which attends to itself or to a context.

    Args:
        width: of the sequence, and of the context.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
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
