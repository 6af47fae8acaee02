"""The autoregressive prior's network (unCLIP, section 2.2): a causal transformer over tokens.

The sequence is: the condition's tokens (encoded text, CLIP text embedding), a start position, and
all tokens but the last. From the start position on, each gives the logits of the next token. All
tokens share one table of bucket embeddings, since a bucket means the same number of standard
deviations for each; positions tell tokens apart. Logits are products with the same table.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cascade.conditioning import Cond, Fourier
from cascade.nets.attention import TransformerBlock, unmasked
from cascade.nets.layers import run, zero
from cascade.nets.prior import Places, causal_mask


@dataclass
class Cache:
    """Keys and values, preallocated for all positions.

    Positions to come are zero and masked, so every token takes the same time and shapes.

    Args:
        kv: keys and values of each layer; the first `length` positions are filled.
        allowed: where a position may attend to another (`causal_mask`).
    """

    kv: Float[Tensor, "layers 2 b heads n c"]
    allowed: Bool[Tensor, "b 1 n n"] | Float[Tensor, "b 1 n n"]
    length: int = 0


class TokenTransformer(nn.Module):
    """Logits of 1 + `components` tokens, each from those before it.

    Args:
        components: number of tokens after the first, which is the dot product.
        buckets: v, the number of values of a token.
        width, layers, heads: sizes of the transformer; `cond.tokens` have the same width.
        context: the greatest length of the text; the CLIP text embedding is one more token.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

    Raises:
        UserError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        components: int,
        buckets: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.width, self.checkpoint = width, checkpoint
        # Buckets start as waves over their range, so that neighbours are similar: from random ones,
        # a small network takes 1.6 times as many steps to the same loss. The device is explicit,
        # because once transformers has loaded a model, `torch.device` no longer covers linspace.
        values = torch.linspace(-20, 20, buckets, device=torch.get_default_device())
        waves = Fourier(width)(values)
        self.embed = nn.Embedding.from_pretrained(waves, freeze=False)
        # Half as large as the buckets, so that a token's position is visible from the start.
        self.prefix_positions = nn.Parameter(torch.randn(context + 1, width) * 0.5)
        self.positions = nn.Parameter(torch.randn(1 + components, width) * 0.5)
        self.places = Places(context)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.embed_out = zero(nn.Linear(width, width))

    def forward(self, tokens: Int64[Tensor, "b t"], cond: Cond) -> Float[Tensor, "b t v"]:
        """Logits of each token, from the condition and the tokens before it."""
        t = tokens.shape[1]
        own = F.pad(self.embed(tokens[:, :-1]), (0, 0, 1, 0)) + self.positions[:t]
        h = torch.cat([self._prefix(cond), own], 1)
        allowed = causal_mask(F.pad(cond.mask, (0, t), value=unmasked(cond.mask)))
        for block in self.blocks:
            h = run(self, block, h, allowed)
        return self._logits(h[:, -t:])

    @torch.no_grad()
    def prefill(self, cond: Cond) -> tuple[Float[Tensor, "b v"], Cache]:
        """Logits of the first token, and the cache for `step`."""
        start = self.positions[:1].expand(len(cond.tokens), -1, -1)
        h = torch.cat([self._prefix(cond), start], 1)
        own = len(self.positions)
        allowed = causal_mask(F.pad(cond.mask, (0, own), value=unmasked(cond.mask)))
        heads = self.blocks[0].heads
        room = (len(self.blocks), 2, len(h), heads, allowed.shape[2], h.shape[2] // heads)
        cache = Cache(h.new_zeros(room), allowed)
        return self._continued(h, cache), cache

    @torch.no_grad()
    def step(self, token: Int64[Tensor, " b"], cache: Cache) -> Float[Tensor, "b v"]:
        """Logits of the token after this one, which is added to the cache."""
        prefix = cache.allowed.shape[2] - len(self.positions)
        h = self.embed(token) + self.positions[cache.length - prefix]
        return self._continued(h[:, None], cache)

    def _prefix(self, cond: Cond) -> Float[Tensor, "b n w"]:
        return cond.tokens + self.places(self.prefix_positions, cond)

    def _continued(self, h: Float[Tensor, "b m w"], cache: Cache) -> Float[Tensor, "b v"]:
        places = slice(cache.length, cache.length + h.shape[1])
        for block, kv in zip(self.blocks, cache.kv):
            h = block(h, cache.allowed[:, :, places], cache=(kv, places))
        cache.length = places.stop
        return self._logits(h[:, -1])

    def _logits(self, h: Float[Tensor, "b *t w"]) -> Float[Tensor, "b *t v"]:
        scores = F.linear(self.embed_out(self.norm_out(h)), self.embed.weight)
        return scores / self.width**0.5  # scaled as in attention
