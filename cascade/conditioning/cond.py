"""The condition that a network reads, through four ports."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

# True where a token may be attended to; or log-weights, added to the logits of all attention to it:
# 0 leaves a token as it is, -inf hides it.
Mask = Bool[Tensor, "b n"] | Float[Tensor, "b n"]


def log_weights(mask: Mask) -> Float[Tensor, "b n"]:
    """A mask as log-weights."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


@dataclass(frozen=True)
class Cond:
    """A network's condition: what it reads besides x_t and the noise level.

    Networks read the ports. `sketch` is read by the stage, whose loss supervises it, and
    `after_text` by the priors, which need to know where the text ends.
    """

    # The ports.
    vector: Float[Tensor, "b d"] | None = None  # added to the noise-level embedding
    tokens: Float[Tensor, "b n w"] | None = None  # attended to
    mask: Mask | None = None  # which of the `tokens` are attended to, or how much
    image: Float[Tensor, "b c height width"] | None = None  # concatenated to x_t
    added: tuple[Tensor, ...] = ()  # to the skip connections and the middle of a U-Net
    # Parts of them.
    sketch: Float[Tensor, "b p height width"] | None = None  # the first channels of `image`
    after_text: int = 0  # number of tokens after the text, whose length varies by batch

    def cat(self, other: "Cond") -> "Cond":
        """Concatenates two conditions along the batch: this one's samples first.

        Their texts may differ in length: the shorter one is padded.
        """
        one, other = self._beside(other), other._beside(self)
        ports = {f.name: getattr(one, f.name) for f in fields(one)}
        pairs = {k: (a, getattr(other, k)) for k, a in ports.items() if isinstance(a, Tensor)}
        return replace(one, **{k: torch.cat(pair) for k, pair in pairs.items()})

    def _beside(self, other: "Cond") -> "Cond":
        """The same condition with as many tokens as another, and with the other's kind of mask."""
        tokens, mask = self.tokens, self.mask
        if tokens is None or mask is None or other.tokens is None or other.mask is None:
            return self
        if other.mask.dtype != mask.dtype:
            mask = log_weights(mask)
        if more := max(0, other.tokens.shape[1] - tokens.shape[1]):
            end = tokens.shape[1] - self.after_text
            hidden = False if mask.dtype == torch.bool else -math.inf
            padding = tokens.new_zeros(len(tokens), more, tokens.shape[2])
            tokens = torch.cat([tokens[:, :end], padding, tokens[:, end:]], 1)
            padding = mask.new_full((len(mask), more), hidden)
            mask = torch.cat([mask[:, :end], padding, mask[:, end:]], 1)
        return replace(self, tokens=tokens, mask=mask)


def set_null(embedder: Any, learned: bool) -> None:
    """Sets the replacement of a dropped condition: a parameter, or zeros outside the state dict."""
    if learned:
        embedder.null = nn.Parameter(torch.randn(embedder.size))
    else:
        embedder.register_buffer("null", torch.zeros(embedder.size), persistent=False)
