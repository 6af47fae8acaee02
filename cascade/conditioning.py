"""From a batch to the four ports that every network reads.

A `Conditioner` holds one embedder for each batch key that conditions its stage. A caption or a
CLIP embedding can be dropped (classifier-free guidance): the drop is drawn once for each source,
so all that stems from the caption falls together, and is mixed in by `torch.where`, so that every
parameter gets a gradient on every rank. The low-resolution picture is never dropped.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.diffusion.noise import Noise

Batch = dict[str, Any]

# What stems from the caption is dropped with the caption.
SOURCE = {"text": "caption", "tokens": "caption", "clip_text": "caption"}


@dataclass(frozen=True)
class Cond:
    """What a network is told, besides x_t and the noise level."""

    vector: Float[Tensor, "b d"] | None = None  # added to the noise-level embedding
    tokens: Float[Tensor, "b n w"] | None = None  # attended to
    mask: Bool[Tensor, "b n"] | None = None  # true where `tokens` may be attended to
    image: Float[Tensor, "b c height width"] | None = None  # concatenated to x_t
    sketch: Float[Tensor, "b p height width"] | None = None  # of x0; the first part of `image`

    def cat(self, other: "Cond") -> "Cond":
        """Both conditions in one batch: this one's samples, then the other's."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Cond(**{k: None if a is None else torch.cat([a, b]) for k, (a, b) in pairs.items()})


class Fourier(nn.Module):
    """Sinusoidal features of a number in about [-20, 20], such as logsnr: periods 0.5 to 100."""

    def __init__(self, dim: int):
        super().__init__()
        frequencies = 2 * math.pi / torch.logspace(math.log10(0.5), 2, dim // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        angles = x.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Vector(nn.Module):
    """An embedding such as `clip_image` [b, d], as a vector and as further tokens.

    unCLIP (section 2.1): projected and added to the noise-level embedding, and projected to four
    more tokens of context; when dropped, a learned embedding takes its place.

    Args:
        key: the batch key.
        size: d, the size of the embedding.
        dim: size of the vector; None for no vector.
        width: width of the tokens; None for no tokens.
        tokens: how many tokens.
    """

    def __init__(
        self, key: str, size: int, dim: int | None = None, width: int | None = None, tokens: int = 4
    ):
        super().__init__()
        self.key, self.tokens = key, tokens
        self.scale = size**0.5  # unit norm in the batch, unit variance here
        self.null = nn.Parameter(torch.randn(size))
        self.to_vector = nn.Linear(size, dim) if dim else None
        self.to_tokens = nn.Linear(size, tokens * width) if width else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        z = torch.where(keep[:, None], batch[self.key] * self.scale, self.null)
        if self.to_tokens is None:
            return Cond(vector=self.to_vector(z))
        tokens = self.to_tokens(z).unflatten(1, (self.tokens, -1))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)
        return Cond(self.to_vector(z) if self.to_vector else None, tokens, mask)


class Sequence(nn.Module):
    """The caption as a sequence of states, and its last state as a vector (GLIDE, section 2.1).

    The states come from a frozen encoder (batch keys `text`, `text_mask`), or from a transformer
    that is trained with the stage (`encoder`, reading `tokens`). A dropped caption is one learned
    token.

    Args:
        size: width of the states.
        width: width of the tokens that the network attends to.
        dim: size of the vector made of the last state; None for no vector.
        encoder: maps `tokens` [b, n] to states [b, n, size] and their mask [b, n].
    """

    def __init__(
        self, size: int, width: int, dim: int | None = None, encoder: nn.Module | None = None
    ):
        super().__init__()
        self.key = "tokens" if encoder else "text"
        self.encoder = encoder
        self.norm = nn.LayerNorm(size)
        self.null = nn.Parameter(torch.randn(size))
        self.to_tokens = nn.Linear(size, width)
        self.to_vector = nn.Linear(size, dim) if dim else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        if self.encoder:
            states, mask = self.encoder(batch["tokens"])
        else:
            states, mask = batch["text"].to(self.null.dtype), batch["text_mask"]
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(keep[:, None], mask, first)
        states = torch.where(keep[:, None, None], self.norm(states), self.null)
        vector = None
        if self.to_vector:
            last = mask.sum(1).clamp(min=1) - 1
            vector = self.to_vector(states[torch.arange(len(last), device=last.device), last])
        return Cond(vector, self.to_tokens(states), mask)


def enlarge(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Bicubic enlargement by a whole factor."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic")


class LowRes(nn.Module):
    """The low-resolution picture, enlarged (bicubic) for concatenation to x_t, and its noise level.

    Reads `image_{low}` [b, 3, h, w] and `image_{low}_level` [b], as a `Corruption` left them;
    never dropped (SR3; Imagen, section 2.5).

    Args:
        low, size: sides of the small and the large picture.
        dim: size of the level's embedding.
    """

    def __init__(self, low: int, size: int, dim: int):
        super().__init__()
        self.key, self.factor = f"image_{low}", size // low
        self.level = nn.Sequential(Fourier(dim // 2), nn.Linear(dim // 2, dim))

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        level = self.level(batch[f"{self.key}_level"])
        return Cond(vector=level, image=enlarge(batch[self.key], self.factor))


class Conditioner(nn.Module):
    """Joins the embedders' parts: vectors are summed, tokens and images concatenated.

    Args:
        embedders: by any name; each reads one batch key.
        drop: for each source ("caption", "clip_image"), the share of training samples without it.
        sketch: makes a further image of the joined tokens and their mask.
    """

    def __init__(
        self,
        embedders: Mapping[str, nn.Module],
        drop: Mapping[str, float] | None = None,
        sketch: nn.Module | None = None,
    ):
        super().__init__()
        self.embedders, self.sketch = nn.ModuleDict(embedders), sketch
        self.drop = dict(drop or {})
        sources = {SOURCE.get(e.key, e.key) for e in self.embedders.values()}
        if unknown := set(self.drop) - sources:
            raise ValueError(f"drop of {sorted(unknown)}, but the conditions are {sorted(sources)}")

    @property
    def reads(self) -> frozenset[str]:
        """The batch keys without which nothing can be sampled."""
        return frozenset(embedder.key for embedder in self.embedders.values())

    def forward(
        self, batch: Batch, noise: Noise | None = None, without: Collection[str] = ()
    ) -> Cond:
        """The condition; with `noise` (in training), each source is dropped at its own rate.

        Args:
            without: sources that are dropped from every sample, to see what they contribute.
        """
        some = batch[next(iter(self.reads))]
        keep = {}
        for source, rate in sorted(self.drop.items()) if noise is not None else ():
            keep[source] = torch.special.ndtr(noise((len(some),))) >= rate
        for source in without:
            keep[source] = torch.zeros(len(some), dtype=torch.bool, device=some.device)
        return self._join(batch, keep, default=True)

    def null(self, batch: Batch) -> Cond:
        """Caption and CLIP embedding dropped; the low-resolution picture stays."""
        return self._join(batch, {}, default=False)

    def _join(self, batch: Batch, keep: dict[str, Tensor], default: bool) -> Cond:
        parts = []
        for embedder in self.embedders.values():
            value = batch[embedder.key]
            all_or_none = torch.full((len(value),), default, device=value.device)
            source = SOURCE.get(embedder.key, embedder.key)
            parts.append(embedder(batch, keep.get(source, all_or_none)))
        vectors = [p.vector for p in parts if p.vector is not None]
        tokens = [p.tokens for p in parts if p.tokens is not None]
        masks = [p.mask for p in parts if p.mask is not None]
        images = [p.image for p in parts if p.image is not None]
        cond = Cond(
            vector=sum(vectors) if vectors else None,
            tokens=torch.cat(tokens, 1) if tokens else None,
            mask=torch.cat(masks, 1) if masks else None,
            image=torch.cat(images, 1) if images else None,
        )
        return cond if self.sketch is None else self._sketched(cond)

    def _sketched(self, cond: Cond) -> Cond:
        sketch = self.sketch(cond.tokens, cond.mask)
        images = [sketch] if cond.image is None else [sketch, cond.image]
        return replace(cond, image=torch.cat(images, 1), sketch=sketch)
