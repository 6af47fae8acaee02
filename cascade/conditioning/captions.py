"""The embedder of a caption's states."""

from collections.abc import Callable, Collection
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.batch import Batch, source
from cascade.conditioning.cond import Cond, log_weights, set_null
from cascade.errors import UserError


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
    that is trained with the stage (`encoder`, reading `tokens`). By default they are normalised
    before both projections, which helped in Imagen (section 2.4). A dropped caption is replaced by
    one token, learned or zero, unless the `Conditioner` replaces it by the empty caption. Weighted
    phrases (`encoders.phrases`) weigh in the mask and in the vector.

    Args:
        size: width of the states.
        width: width of the tokens that the network attends to.
        dim: size of the vector; None for no vector.
        encoder: maps `tokens` [b, n] to states [b, n, size] and their mask [b, n].
        pool: reduces the states to the one that the vector is a projection of: `last` (GLIDE),
            `mean`, or an `encoders.pooling.AttentionPool` (Imagen).
        learned_null: whether the replacement of a dropped caption is learned; otherwise zeros, as
            in Imagen.
        norm: where the tokens are normalised: `before` the projection to tokens (and before that to
            the vector), `after` it (Karlo's decoder), or not at all, None (GLIDE, whose encoder
            ends with a norm; IF; Karlo's prior).
        norm_vector: normalise the vector (IF).
        project: project the states to tokens; otherwise they are the tokens, as in GLIDE.

    Raises:
        UserError: the states of `encoder` have another width than `size`, or states of another
            width than `width` are not projected.
    """

    def __init__(
        self,
        size: int,
        width: int,
        dim: int | None = None,
        encoder: nn.Module | None = None,
        pool: Callable[[Tensor, Tensor], Tensor] = last,
        learned_null: bool = True,
        norm: Literal["before", "after"] | None = "before",
        norm_vector: bool = False,
        project: bool = True,
    ):
        super().__init__()
        if encoder and encoder.width != size:
            raise UserError(
                f"text.size={size}, but the text encoder is {encoder.width} wide: set "
                f"text.encoder.width={size}"
            )
        if not project and width != size:
            raise UserError(
                f"text.size={size} and net.width={width} differ, so the text must be projected: "
                "leave out project=false"
            )
        if norm not in ("before", "after", None):
            raise UserError(f"norm={norm}: choose before, after or null")
        self.key, self.size = "tokens" if encoder else "text", size
        self.dim, self.width = dim, width
        self.encoder, self.norm_before = encoder, norm == "before"
        self.norm = nn.LayerNorm(size if self.norm_before else width) if norm else nn.Identity()
        self.null: Tensor
        set_null(self, learned_null)
        self.to_tokens = nn.Linear(size, width) if project else nn.Identity()
        self.pool = pool if dim else None
        self.to_vector = nn.Linear(size, dim) if dim else None
        self.norm_vector = nn.LayerNorm(dim) if dim and norm_vector else nn.Identity()

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
        tokens = self.to_tokens(states)
        return Cond(vector, tokens if self.norm_before else self.norm(tokens), mask)

    def _states(self, batch: Batch) -> tuple[Float[Tensor, "b n s"], Bool[Tensor, "b n"]]:
        """The states, normalised if that is to happen before their projections, and their mask."""
        if self.encoder:
            states, mask = self.encoder(batch["tokens"])
        else:
            states, mask = batch["text"].to(self.null.dtype), batch["text_mask"]
        return self.norm(states) if self.norm_before else states, mask

    def _vector(
        self, states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b d"] | None:
        if not (self.to_vector and self.pool):
            return None
        return self.norm_vector(self.to_vector(self.pool(states, mask)))


def with_empty(batch: Batch, keep: Bool[Tensor, " b"], keys: Collection[str]) -> Batch:
    """Replaces the keys computed from dropped captions by those of the empty caption.

    Args:
        batch: holds, as `empty`, a batch of one row that was encoded from an empty caption.
        keep: false for the rows to replace.
        keys: the keys that a conditioner reads; those that do not come from the caption stay.
    """
    rows: dict[str, Tensor | Batch] = {}
    mask = ["text_mask"] if "text" in keys else []
    for key in [*(key for key in keys if source(key) == "caption"), *mask]:
        own, empty = batch[key], batch["empty"][key].to(batch[key])
        if own.ndim > 1 and key != "clip_text":  # one entry per token
            length = max(own.shape[1], empty.shape[1])
            own, empty = _padded(own, length), _padded(empty, length)
        rows[key] = torch.where(keep.view(-1, *[1] * (own.ndim - 1)), own, empty)
        if (weights := batch.get(f"{key}_weights")) is not None:  # of phrases
            rows[f"{key}_weights"] = torch.where(keep[:, None], _padded(weights, length), 0.0)
    if "lacking" in batch:
        share = batch["lacking"]["share"]
        rows["lacking"] = {**batch["lacking"], "share": share * keep[:, None].to(share)}
    return {**batch, **rows}


def _padded(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, length - x.shape[1]))
