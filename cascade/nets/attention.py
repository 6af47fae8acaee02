"""Attention over sequences [b, n, w], and the transformer block."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.errors import UserError
from cascade.nets.layers import zero


def split_heads(x: Float[Tensor, "b n w"], parts: int, heads: int) -> tuple[Tensor, ...]:
    """Splits a joint projection into `parts` tensors (queries, keys, values) [b, heads, n, c]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention; the mask is of the kinds of `conditioning.Mask`."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def unmasked(mask: Tensor) -> bool:
    """The value, in a mask of this kind, of a token that is attended to as it is."""
    return mask.dtype == torch.bool  # true; or the log-weight 0


def number_of_heads(width: int, head_channels: int) -> int:
    """The number of heads of this many channels.

    Raises:
        UserError: the heads do not divide the width.
    """
    if width % head_channels:
        raise UserError(
            f"{width} channels are not a multiple of head_channels={head_channels}: "
            "change net.head_channels, net.channels or net.multipliers"
        )
    return width // head_channels


class TokenNorm(nn.GroupNorm):
    """Group normalisation of tokens [b, n, w], with statistics over all tokens of a sample (IF)."""

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


def token_norm(width: int | None, groups: int | None) -> nn.Module:
    """The normalisation of the condition's tokens; the identity if there is none."""
    return TokenNorm(groups, width) if width and groups else nn.Identity()


class Attention(nn.Module):
    """Self-attention with the condition's tokens as further keys and values.

    One softmax covers the sequence and the text (GLIDE, section 2.1; Imagen, appendix B).

    Args:
        channels: width of the sequence.
        head_channels: channels per head.
        width: width of the condition's tokens; None: they are not attended to.
        inner: width of queries, keys and values; None: `channels`.
        token_groups: number of groups in which the tokens are normalised first; None: they are not.

    Raises:
        UserError: `head_channels` does not divide `inner`.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        width: int | None = None,
        inner: int | None = None,
        token_groups: int | None = None,
    ):
        super().__init__()
        inner = inner or channels
        self.heads = number_of_heads(inner, head_channels)
        self.qkv = nn.Linear(channels, 3 * inner)
        self.kv = nn.Linear(width, 2 * inner) if width else None
        self.norm_tokens = token_norm(width, token_groups)
        self.out = zero(nn.Linear(inner, channels))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        tokens: Float[Tensor, "b m w"] | None = None,
        mask: Bool[Tensor, "b m"] | Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        if self.kv is not None and tokens is not None:
            more_k, more_v = split_heads(self.kv(self.norm_tokens(tokens)), 2, self.heads)
            k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
            mask = F.pad(mask, (x.shape[1], 0), value=unmasked(mask))[:, None, None]
        else:
            mask = None
        y = attended(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the condition's tokens alone (Imagen's 1024 px network).

    Each position is independent of the others, so the network remains fully convolutional.

    Args:
        channels: width of the sequence.
        head_channels: channels per head.
        width: width of the condition's tokens.
        inner: width of queries, keys and values; None: `channels`.
        token_groups: number of groups in which the tokens are normalised first; None: they are not.

    Raises:
        UserError: `head_channels` does not divide `inner`.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        width: int,
        inner: int | None = None,
        token_groups: int | None = None,
    ):
        super().__init__()
        inner = inner or channels
        self.heads = number_of_heads(inner, head_channels)
        self.q = nn.Linear(channels, inner)
        self.kv = nn.Linear(width, 2 * inner)
        self.norm_tokens = token_norm(width, token_groups)
        self.out = zero(nn.Linear(inner, channels))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        tokens: Float[Tensor, "b m w"],
        mask: Bool[Tensor, "b m"] | Float[Tensor, "b m"],
    ) -> Float[Tensor, "b n c"]:
        (q,) = split_heads(self.q(x), 1, self.heads)
        k, v = split_heads(self.kv(self.norm_tokens(tokens)), 2, self.heads)
        y = attended(q, k, v, mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block; the sequence attends to itself, or to a context.

    Args:
        width: width of the sequence and of the context.
        heads: number of attention heads.

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
        allowed: Bool[Tensor, "b 1 #n m"] | Float[Tensor, "b 1 #n m"],
        context: Float[Tensor, "b m w"] | None = None,
        cache: tuple[Float[Tensor, "2 b heads m c"], slice] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Transforms a sequence.

        Args:
            allowed: true where a position may attend to another, or log-weights (`Mask`).
            context: the normalised sequence to attend to; None: x itself.
            cache: keys and values of a longer sequence to attend to, and the places of x in it,
                where those of x are written.
        """
        normed = self.norm_attention(x)
        (q,) = split_heads(self.q(normed), 1, self.heads)
        kv = split_heads(self.kv(normed if context is None else context), 2, self.heads)
        if cache is not None:
            whole, places = cache
            whole[:, :, :, places] = torch.stack(kv)
            kv = whole
        y = attended(q, *kv, allowed)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))
