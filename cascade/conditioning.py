"""From a batch to the condition that a network reads, through four ports.

The ports are `vector`, `tokens` with their `mask`, and `image` (see `Cond`); what else a condition
holds describes their parts. A `Conditioner` has one embedder for each batch key that conditions its
stage. Captions and CLIP embeddings are dropped at random (classifier-free guidance). A drop is
drawn once per source, so that all keys computed from the caption are dropped together, and mixed in
by `torch.where`, so that every parameter gets a gradient on every rank. The low-resolution picture
is never dropped.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.batch import Batch, image_key, source
from cascade.diffusion.noise import Noise
from cascade.errors import UserError


@dataclass(frozen=True)
class Cond:
    """A network's condition: what it reads besides x_t and the noise level.

    Networks read the ports. `sketch` is read by the stage, whose loss supervises it, and
    `after_text` by the priors, which need to know where the text ends.
    """

    # The ports.
    vector: Float[Tensor, "b d"] | None = None  # added to the noise-level embedding
    tokens: Float[Tensor, "b n w"] | None = None  # attended to
    mask: Bool[Tensor, "b n"] | None = None  # true where `tokens` may be attended to
    image: Float[Tensor, "b c height width"] | None = None  # concatenated to x_t
    # Parts of them.
    sketch: Float[Tensor, "b p height width"] | None = None  # the first channels of `image`
    after_text: int = 0  # number of tokens after the text, whose length varies by batch

    def cat(self, other: "Cond") -> "Cond":
        """Concatenates two conditions along the batch: this one's samples first."""
        ports = {f.name: getattr(self, f.name) for f in fields(self)}
        pairs = {k: (a, getattr(other, k)) for k, a in ports.items() if isinstance(a, Tensor)}
        return replace(self, **{k: torch.cat(pair) for k, pair in pairs.items()})


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


class Sequence(nn.Module):
    """Turns the caption's states into a sequence of tokens, and into a vector.

    The states come from a frozen encoder (batch keys `text`, `text_mask`), or from a transformer
    that is trained with the stage (`encoder`, reading `tokens`). They are normalised before both
    projections, which helped in Imagen (section 2.4). A dropped caption is replaced by one token,
    learned or zero.

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
        if self.encoder:
            states, mask = self.encoder(batch["tokens"])
        else:
            states, mask = batch["text"].to(self.null.dtype), batch["text_mask"]
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(keep[:, None], mask, first)
        states = torch.where(keep[:, None, None], self.norm(states), self.null)
        pooled = self.pool(states, mask) if self.pool else None
        vector = self.to_vector(pooled) if self.to_vector else None
        return Cond(vector, self.to_tokens(states), mask)


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


class Conditioner(nn.Module):
    """Joins the embedders' conditions: sums vectors, concatenates tokens and images.

    Args:
        embedders: by any name; each reads one batch key.
        drop: for each source ("caption", "clip_image"), the share of training samples without it.
        sketch: computes a further image from the joined tokens and their mask.
    """

    def __init__(
        self,
        embedders: Mapping[str, nn.Module],
        drop: Mapping[str, float] | None = None,
        sketch: nn.Module | None = None,
    ):
        super().__init__()
        self.embedders: Any = nn.ModuleDict(embedders)
        self.sketch = sketch
        self.drop = dict(drop or {})
        sources = {source(embedder.key) for embedder in self.embedders.values()}
        if unknown := set(self.drop) - sources:
            raise ValueError(f"drop of {sorted(unknown)}, but the conditions are {sorted(sources)}")

    @property
    def reads(self) -> frozenset[str]:
        """The batch keys that the embedders read."""
        return frozenset(embedder.key for embedder in self.embedders.values())

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the embeddings and text states that a batch must have, by key."""
        sized = [e for e in self.embedders.values() if isinstance(e, (Vector, Sequence))]
        return {e.key: e.size for e in sized if e.key != "tokens"}

    def forward(
        self, batch: Batch, noise: Noise | None = None, without: Collection[str] = ()
    ) -> Cond:
        """Embeds a batch.

        Args:
            noise: given in training, where each source is dropped at its own rate.
            without: sources dropped from every sample, to measure what they contribute.
        """
        some = batch[next(iter(self.reads))]
        keep = {}
        if noise is not None:
            for name, rate in sorted(self.drop.items()):  # each draw advances the stream
                keep[name] = torch.special.ndtr(noise((len(some),))) >= rate
        for name in without:
            keep[name] = torch.zeros(len(some), dtype=torch.bool, device=some.device)
        return self._join(batch, keep, default=True)

    def null(self, batch: Batch) -> Cond:
        """Embeds a batch with its caption and CLIP embedding dropped; the small picture stays."""
        return self._join(batch, {}, default=False)

    def _join(self, batch: Batch, keep: dict[str, Tensor], default: bool) -> Cond:
        parts = []
        for embedder in self.embedders.values():
            value = batch[embedder.key]
            all_or_none = torch.full((len(value),), default, device=value.device)
            parts.append(embedder(batch, keep.get(source(embedder.key), all_or_none)))
        vectors = [p.vector for p in parts if p.vector is not None]
        tokens = [p.tokens for p in parts if p.tokens is not None]
        masks = [p.mask for p in parts if p.mask is not None]
        images = [p.image for p in parts if p.image is not None]
        after_text = 0  # tokens after the last embedder of text, which itself reports 0
        for part in (p for p in parts if p.tokens is not None):
            after_text = after_text + part.after_text if part.after_text else 0
        cond = Cond(
            vector=sum(vectors) if vectors else None,
            tokens=torch.cat(tokens, 1) if tokens else None,
            mask=torch.cat(masks, 1) if masks else None,
            image=torch.cat(images, 1) if images else None,
            after_text=after_text,
        )
        if self.sketch is None:
            return cond
        sketch = self.sketch(cond.tokens, cond.mask)
        return replace(cond, image=torch.cat([sketch, *images], 1), sketch=sketch)
