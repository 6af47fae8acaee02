"""From one batch key to its part of a condition.

A dropped key is mixed in by `torch.where`, so that every parameter gets a gradient on every rank.
The low-resolution picture is never dropped.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.batch import Batch, image_key
from cascade.conditioning.cond import Cond, log_weights
from cascade.errors import UserError


class Fourier(nn.Module):
    """Sines and cosines of a number in about [-20, 20], such as logsnr, with periods 0.5 to 100."""

    def __init__(self, dim: int):
        super().__init__()
        self.frequencies: Tensor
        frequencies = 2 * math.pi / torch.logspace(math.log10(0.5), 2, dim // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        angles = x.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Vector(nn.Module):
    """Turns an embedding such as `clip_image` [b, d] into a vector and into further tokens.

    As in unCLIP (section 2.1) the embedding is projected and added to the noise-level embedding,
    and projected to four more tokens of context. A dropped embedding is replaced by a learned one,
    or by zeros. (unCLIP's factor of 17.2 scales what the prior denoises, so it belongs to the
    codec; no paper gives a scale for conditions.)

    Args:
        key: the batch key.
        size: d, the size of the embedding.
        dim: size of the vector; None for no vector.
        width: width of the tokens; None for no tokens.
        tokens: number of tokens.
        learned_null: whether the replacement of a dropped embedding is learned; otherwise zeros.
    """

    def __init__(
        self,
        key: str,
        size: int,
        dim: int | None = None,
        width: int | None = None,
        tokens: int = 4,
        learned_null: bool = True,
    ):
        super().__init__()
        self.key, self.size, self.tokens = key, size, tokens
        self.dim, self.width = dim, width
        self.scale = size**0.5  # unit norm in the batch, unit variance here
        self.null: Tensor
        _set_null(self, learned_null)
        self.to_vector = nn.Linear(size, dim) if dim else None
        self.to_tokens = nn.Linear(size, tokens * width) if width else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        z = torch.where(keep[:, None], batch[self.key] * self.scale, self.null)
        vector = self.to_vector(z) if self.to_vector else None
        if self.to_tokens is None:
            return Cond(vector)
        tokens = self.to_tokens(z).unflatten(1, (self.tokens, -1))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)
        return Cond(vector, tokens, mask, after_text=self.tokens)


def last(states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b s"]:
    """Pools to the state of the last token, end-of-text (GLIDE, section 2.1)."""
    end = mask.sum(1).clamp(min=1) - 1
    return states[torch.arange(len(end), device=end.device), end]


def mean(states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b s"]:
    """Pools to the mean state of the caption's tokens."""
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bn,bns->bs", share.to(states.dtype), states)


def weighed(
    pooled: Float[Tensor, "b d"], lacking: Float[Tensor, "k d"], share: Float[Tensor, "b k"]
) -> Float[Tensor, "b d"]:
    """Moves pooled vectors of captions away from those of the same captions without a phrase.

    A share of -1 gives the vector without the phrase, 0 changes no bit, and more than 0
    extrapolates. The shifts of several phrases add up.
    """
    return pooled + share.sum(1, keepdim=True) * pooled - share @ lacking


class Sequence(nn.Module):
    """Turns the caption's states into a sequence of tokens, and into a vector.

    The states come from a frozen encoder (batch keys `text`, `text_mask`), or from a transformer
    that is trained with the stage (`encoder`, reading `tokens`). They are normalised before both
    projections, which helped in Imagen (section 2.4). A dropped caption is replaced by one token,
    learned or zero. Weighted phrases (`encoders.phrases`) weigh in the mask and in the vector.

    Args:
        size: width of the states.
        width: width of the tokens that the network attends to.
        dim: size of the vector; None for no vector.
        encoder: maps `tokens` [b, n] to states [b, n, size] and their mask [b, n].
        pool: reduces the states to the one that the vector is a projection of: `last` (GLIDE),
            `mean`, or an `encoders.pooling.AttentionPool` (Imagen).
        learned_null: whether the replacement of a dropped caption is learned; otherwise zeros, as
            in Imagen.

    Raises:
        UserError: the states of `encoder` have another width than `size`.
    """

    def __init__(
        self,
        size: int,
        width: int,
        dim: int | None = None,
        encoder: nn.Module | None = None,
        pool: Callable[[Tensor, Tensor], Tensor] = last,
        learned_null: bool = True,
    ):
        super().__init__()
        if encoder and encoder.width != size:
            raise UserError(
                f"text.size={size}, but the text encoder is {encoder.width} wide: set "
                f"text.encoder.width={size}"
            )
        self.key, self.size = "tokens" if encoder else "text", size
        self.dim, self.width = dim, width
        self.encoder = encoder
        self.norm = nn.LayerNorm(size)
        self.null: Tensor
        _set_null(self, learned_null)
        self.to_tokens = nn.Linear(size, width)
        self.pool = pool if dim else None
        self.to_vector = nn.Linear(size, dim) if dim else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        states, mask = self._states(batch)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(keep[:, None], mask, first)
        states = torch.where(keep[:, None, None], states, self.null)
        vector = self._vector(states, mask)
        if (weights := batch.get(f"{self.key}_weights")) is not None:
            mask = log_weights(mask) + torch.where(keep[:, None], weights, 0.0)
            lacking = self._vector(*self._states(batch["lacking"]))
            if vector is not None and lacking is not None:
                share = batch["lacking"]["share"].to(vector) * keep[:, None]
                vector = weighed(vector, lacking, share)
        return Cond(vector, self.to_tokens(states), mask)

    def _states(self, batch: Batch) -> tuple[Float[Tensor, "b n s"], Bool[Tensor, "b n"]]:
        """The normalised states, and their mask."""
        if self.encoder:
            states, mask = self.encoder(batch["tokens"])
        else:
            states, mask = batch["text"].to(self.null.dtype), batch["text_mask"]
        return self.norm(states), mask

    def _vector(
        self, states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b d"] | None:
        return self.to_vector(self.pool(states, mask)) if self.to_vector and self.pool else None


def _set_null(embedder: "Vector | Sequence", learned: bool) -> None:
    """Sets the replacement of a dropped condition: a parameter, or zeros outside the state dict."""
    if learned:
        embedder.null = nn.Parameter(torch.randn(embedder.size))
    else:
        embedder.register_buffer("null", torch.zeros(embedder.size), persistent=False)


def enlarge(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Enlarges by a whole factor, bicubically."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic")


class LowRes(nn.Module):
    """The low-resolution picture, enlarged (bicubic), as `image`, and its noise level as `vector`.

    Reads `image_{low}` [b, 3, h, w] and `image_{low}_level` [b], which a `Corruption` writes.
    Neither is ever dropped (SR3; Imagen, section 2.5).

    Args:
        low, size: sides of the small and the large picture, in pixels.
        dim: size of the level's embedding.
    """

    def __init__(self, low: int, size: int, dim: int):
        super().__init__()
        self.key, self.factor, self.dim = image_key(low), size // low, dim
        self.level = nn.Sequential(Fourier(dim // 2), nn.Linear(dim // 2, dim))

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        level = self.level(batch[f"{self.key}_level"])
        return Cond(vector=level, image=enlarge(batch[self.key], self.factor))
