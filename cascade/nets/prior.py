"""The diffusion prior's network (unCLIP, section 2.2): a decoder-only causal transformer.

The sequence is: the condition's tokens (encoded text, CLIP text embedding), the noise level, the
noised CLIP image embedding, and a learned query, whose output is the prediction. If the text is
dropped, the noised embedding remains, so the unconditional branch still reads x_t. Tokens after the
text take the positions after the full context, whatever the text lengths in a batch.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.conditioning import Cond, Mask
from cascade.errors import UserError
from cascade.nets.attention import TransformerBlock, unmasked
from cascade.nets.layers import NoiseLevel, Timestep, run, zero


def causal_mask(mask: Mask) -> Bool[Tensor, "b 1 n n"] | Float[Tensor, "b 1 n n"]:
    """Where a position may attend to another: to itself, and to earlier unmasked ones.

    True there, or the log-weight of the other position if the mask has them.
    """
    n = mask.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=mask.device)
    seen = mask if mask.dtype == torch.bool else mask > -math.inf
    allowed = (causal & seen[:, None]) | itself
    if mask.dtype != torch.bool:
        allowed = torch.where(seen, mask, 0.0)[:, None].masked_fill(~allowed, -math.inf)
    return allowed[:, None]


class Places(nn.Module):
    """Assigns rows of a table of positions to a condition's tokens.

    The text takes rows 0, 1, ...; tokens after it take the rows after the full context, as in the
    priors of Karlo and Kandinsky, so that no sample depends on the longest text in its batch. State
    dicts of this layout have the key `KEY`. Older ones lack it: they were trained with the rows
    after the longest text in the batch, and keep them (`fixed` is false).

    Args:
        context: the greatest length of the text.
    """

    KEY, VERSION = "places.version", 2

    def __init__(self, context: int):
        super().__init__()
        self.context, self.fixed = context, True

    def forward(self, table: Float[Tensor, "m w"], cond: Cond) -> Float[Tensor, "n w"]:
        """The position of each token. Raises UserError if the text is longer than the context."""
        n = cond.tokens.shape[1]
        if (text := n - cond.after_text) > self.context:
            raise UserError(
                f"a caption has {text} tokens, and the prior takes {self.context}: set net.context "
                "to the length of the text encoder"
            )
        if not self.fixed:
            return table[:n]
        end = self.context + 1
        return torch.cat([table[:text], table[end - cond.after_text : end]])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fixed:
            destination[f"{prefix}version"] = torch.tensor(self.VERSION)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.fixed = state_dict.pop(f"{prefix}version", None) is not None
        super()._load_from_state_dict(state_dict, prefix, *args)


class PriorTransformer(nn.Module):
    """F(x, logsnr, cond) for an embedding x [b, d].

    Args:
        size: d, the size of the embedding.
        width, layers, heads: sizes of the transformer; `cond.tokens` have the same width.
        context: the greatest length of the text; the CLIP text embedding is one more token.
        level: features of the noise level; None: Fourier features of logsnr itself.
        skip: add x to the output, scaled by the noise level (published priors do not).
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

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
        skip: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.width, self.checkpoint = width, checkpoint
        self.noise_level = NoiseLevel(width, level)
        self.embed_in = nn.Linear(size, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(context + 4, width) * 0.02)
        self.places = Places(context)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.embed_out = zero(nn.Linear(width, size))
        self.skip = zero(nn.Linear(width, size)) if skip else None

    def forward(
        self, x: Float[Tensor, "b d"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b d"]:
        level = self.noise_level(logsnr)
        own = [level, self.embed_in(x), self.query.expand(len(x), -1)]
        h = torch.cat([cond.tokens, torch.stack(own, 1).to(cond.tokens.dtype)], 1)
        h = h + torch.cat([self.places(self.positions, cond), self.positions[-3:]])
        allowed = causal_mask(F.pad(cond.mask, (0, 3), value=unmasked(cond.mask)))
        for block in self.blocks:
            h = run(self, block, h, allowed)
        # At low noise the output is nearly x itself, which a transformer is slow to learn to copy.
        out = self.embed_out(self.norm_out(h[:, -1]))
        return out if self.skip is None else out + self.skip(F.silu(level)) * x
