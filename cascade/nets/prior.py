"""The diffusion prior's network (unCLIP, section 2.2): a decoder-only causal transformer.

The sequence is: the condition's tokens (encoded text, CLIP text embedding), the noise level, the
noised CLIP image embedding, and a learned query, at which the answer is read. Dropping the text
leaves the noised embedding in the sequence, so the unconditional branch sees x_t.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.nets.layers import NoiseLevel, Timestep, TransformerBlock, run, zero


def causal_mask(mask: Bool[Tensor, "b n"]) -> Bool[Tensor, "b 1 n n"]:
    """Which position may attend to which: itself, and earlier ones where `mask` is true."""
    n = mask.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None]) | itself)[:, None]


class PriorTransformer(nn.Module):
    """F(x, logsnr, cond) for an embedding x [b, d].

    Args:
        size: d, the size of the embedding.
        width, layers, heads: of the transformer; `cond.tokens` have the same width.
        context: the greatest length of the text; the CLIP text embedding is one token more.
        level: features of the noise level; None: those of logsnr itself.
        checkpoint: keep the inputs of blocks only, and compute them again in backward.

    Raises:
        UserError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        size: int,
        width: int,
        layers: int,
        heads: int,
        context: int,
        level: Timestep | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.width, self.checkpoint = width, checkpoint
        self.noise_level = NoiseLevel(width, level)
        self.embed_in = nn.Linear(size, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(context + 4, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.embed_out = zero(nn.Linear(width, size))
        self.skip = zero(nn.Linear(width, size))

    def forward(
        self, x: Float[Tensor, "b d"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b d"]:
        b, n, _ = cond.tokens.shape
        level = self.noise_level(logsnr)
        own = [level, self.embed_in(x), self.query.expand(b, -1)]
        h = torch.cat([cond.tokens, torch.stack(own, 1).to(cond.tokens.dtype)], 1)
        # The last three positions are the same whatever the length of the text.
        h = h + torch.cat([self.positions[:n], self.positions[-3:]])
        allowed = causal_mask(F.pad(cond.mask, (0, 3), value=True))
        for block in self.blocks:
            h = run(self, block, h, allowed)
        # Little noise: the answer is nearly x itself, which a transformer is slow to learn to copy.
        return self.embed_out(self.norm_out(h[:, -1])) + self.skip(F.silu(level)) * x
