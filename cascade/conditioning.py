"""From a batch to the four ports that every network reads.

A `Conditioner` holds one embedder for each batch key that conditions its stage. A caption or a
CLIP embedding can be dropped (classifier-free guidance): the drop is drawn once for each source,
so all that stems from the caption falls together, and is mixed in by `torch.where`, so that every
parameter gets a gradient on every rank. The low-resolution picture is never dropped.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.diffusion.noise import Noise
from cascade.errors import UserError

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
    after_text: int = 0  # how many tokens follow the text (whose length varies by batch)

    def cat(self, other: "Cond") -> "Cond":
        """Both conditions in one batch: this one's samples, then the other's."""
        ports = {f.name: getattr(self, f.name) for f in fields(self)}
        pairs = {k: (a, getattr(other, k)) for k, a in ports.items() if isinstance(a, Tensor)}
        return replace(self, **{k: torch.cat(pair) for k, pair in pairs.items()})


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
    more tokens of context; when dropped, a learned embedding takes its place, or zeros. (unCLIP's
    17.2 scales what the prior denoises: it is the codec's. For conditions no paper gives a scale.)

    Args:
        key: the batch key.
        size: d, the size of the embedding.
        dim: size of the vector; None for no vector.
        width: width of the tokens; None for no tokens.
        tokens: how many tokens.
        learned_null: whether what stands for a dropped embedding is learned; otherwise zeros.
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
        _set_null(self, learned_null)
        self.to_vector = nn.Linear(size, dim) if dim else None
        self.to_tokens = nn.Linear(size, tokens * width) if width else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        z = torch.where(keep[:, None], batch[self.key] * self.scale, self.null)
        if self.to_tokens is None:
            return Cond(vector=self.to_vector(z))
        tokens = self.to_tokens(z).unflatten(1, (self.tokens, -1))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=z.device)
        vector = self.to_vector(z) if self.to_vector else None
        return Cond(vector, tokens, mask, after_text=self.tokens)


def last(states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b s"]:
    """The state of the last token, end-of-text (GLIDE, section 2.1)."""
    end = mask.sum(1).clamp(min=1) - 1
    return states[torch.arange(len(end), device=end.device), end]


def mean(states: Float[Tensor, "b n s"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b s"]:
    """The mean state of the caption's tokens."""
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bn,bns->bs", share.to(states.dtype), states)


class Sequence(nn.Module):
    """The caption as a sequence of states, and a vector made of them.

    The states come from a frozen encoder (batch keys `text`, `text_mask`), or from a transformer
    that is trained with the stage (`encoder`, reading `tokens`). They are normalised first, for
    the tokens and for the vector (Imagen, section 2.4, found that to help). A dropped caption is
    one token, learned or zero.

    Args:
        size: width of the states.
        width: width of the tokens that the network attends to.
        dim: size of the vector; None for no vector.
        encoder: maps `tokens` [b, n] to states [b, n, size] and their mask [b, n].
        pool: makes one state of all, of which the vector is a projection: `last` (GLIDE), `mean`,
            or an `encoders.pooling.AttentionPool` (Imagen).
        learned_null: whether what stands for a dropped caption is learned; otherwise zeros, as
            Imagen's text embeddings are then.

    Raises:
        UserError: `encoder` has states of another width.
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
        _set_null(self, learned_null)
        self.to_tokens = nn.Linear(size, width)
        self.pool = pool if dim else None
        self.to_vector = nn.Linear(size, dim) if dim else None

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        if self.encoder:
            states, mask = self.encoder(batch["tokens"])
        else:
            states, mask = batch["text"].to(self.null.dtype), batch["text_mask"]
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(keep[:, None], mask, first)
        states = torch.where(keep[:, None, None], self.norm(states), self.null)
        vector = self.to_vector(self.pool(states, mask)) if self.to_vector else None
        return Cond(vector, self.to_tokens(states), mask)


def _set_null(embedder: "Vector | Sequence", learned: bool) -> None:
    """What stands for a dropped condition: a parameter, or zeros that no state dict holds."""
    if learned:
        embedder.null = nn.Parameter(torch.randn(embedder.size))
    else:
        embedder.register_buffer("null", torch.zeros(embedder.size), persistent=False)


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
        self.key, self.factor, self.dim = f"image_{low}", size // low, dim
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

    @property
    def sizes(self) -> dict[str, int]:
        """Of the embeddings and encoded captions that are expected in a batch, by key."""
        sized = [e for e in self.embedders.values() if isinstance(e, (Vector, Sequence))]
        return {e.key: e.size for e in sized if e.key != "tokens"}

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
        after_text = 0
        for part in (p for p in parts if p.tokens is not None):
            after_text = after_text + part.after_text if part.after_text else 0
        cond = Cond(
            vector=sum(vectors) if vectors else None,
            tokens=torch.cat(tokens, 1) if tokens else None,
            mask=torch.cat(masks, 1) if masks else None,
            image=torch.cat(images, 1) if images else None,
            after_text=after_text,
        )
        return cond if self.sketch is None else self._sketched(cond)

    def _sketched(self, cond: Cond) -> Cond:
        sketch = self.sketch(cond.tokens, cond.mask)
        images = [sketch] if cond.image is None else [sketch, cond.image]
        return replace(cond, image=torch.cat(images, 1), sketch=sketch)
