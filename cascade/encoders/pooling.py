"""Attention pooling of a caption's states; `conditioning` has the simpler `last` and `mean`."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.conditioning import mean
from cascade.errors import UserError
from cascade.nets.attention import split_heads


class AttentionPool(nn.Module):
    """Pools a caption's states by one attention query (Imagen, section 2.4; DeepFloyd-IF).

    The query is the mean state plus a learned vector. It is also a key and value alongside the
    states, as in the attention pooling of CLIP's residual networks (2103.00020, section 2.4).

    Args:
        size: width of the states.
        heads: number of attention heads (IF: 64).
        norm: normalise the states first (IF, whose tokens are not).

    Raises:
        UserError: `heads` does not divide `size`.
    """

    def __init__(self, size: int, heads: int, norm: bool = False):
        super().__init__()
        if size % heads:
            raise UserError(
                f"{heads} heads do not divide text states of width {size}: set the pool's heads "
                "to a divisor"
            )
        self.heads = heads
        self.norm = nn.LayerNorm(size) if norm else nn.Identity()
        self.query = nn.Parameter(torch.randn(size) * size**-0.5)
        self.q = nn.Linear(size, size)
        self.kv = nn.Linear(size, 2 * size)

    def forward(
        self, states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b s"]:
        states = self.norm(states)
        whole = mean(states, mask)[:, None] + self.query
        (q,) = split_heads(self.q(whole), 1, self.heads)
        k, v = split_heads(self.kv(torch.cat([whole, states], 1)), 2, self.heads)
        mask = F.pad(mask, (1, 0), value=True)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(1)
