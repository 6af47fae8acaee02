"""Embedders of one vector: a CLIP embedding, a class, numbers such as a noise level or sides."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.batch import FRAMING, Batch
from cascade.conditioning.cond import Cond, set_null
from cascade.errors import UserError


class Fourier(nn.Module):
    """Sines and cosines of a number, by default in about [-20, 20], such as logsnr.

    Args:
        dim: number of features; even.
        shortest, longest: of their periods.
    """

    def __init__(self, dim: int, shortest: float = 0.5, longest: float = 100.0):
        super().__init__()
        self.dim = 2 * (dim // 2)
        self.frequencies: Tensor
        periods = torch.logspace(math.log10(shortest), math.log10(longest), dim // 2)
        frequencies = 2 * math.pi / periods
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
        unit: whether the embeddings have unit norm. They are then scaled by the root of d, to unit
            variance; raw ones, as the systems of Karlo's family read them, are taken as they are.
    """

    def __init__(
        self,
        key: str,
        size: int,
        dim: int | None = None,
        width: int | None = None,
        tokens: int = 4,
        learned_null: bool = True,
        unit: bool = True,
    ):
        super().__init__()
        self.key, self.size, self.tokens = key, size, tokens
        self.dim, self.width, self.unit = dim, width, unit
        self.scale = size**0.5 if unit else 1.0
        self.null: Tensor
        set_null(self, learned_null)
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


class Extent(nn.Module):
    """Turns two numbers of pixels, such as a height and a width [b, 2], into a vector.

    Each is expanded in sines and cosines, and all together are projected by two layers (SDXL,
    section 2.2). They are never dropped. In sampling, a picture is by default of the size that it
    is painted in, and is not cropped.

    Args:
        key: the batch key; one of `FRAMING`.
        dim: size of the vector.
        features: sines and cosines of each number; even.
    """

    def __init__(self, key: str, dim: int, features: int = 256):
        super().__init__()
        if key not in FRAMING:
            raise UserError(f"an Extent of {key}: choose one of {', '.join(FRAMING)}")
        self.key, self.dim = key, dim
        # Up to the sides of the largest files; SDXL's are 2 pi to 2 pi * 10,000.
        self.features = Fourier(features, 2 * math.pi, 2e4 * math.pi)
        self.project = nn.Sequential(
            nn.Linear(2 * self.features.dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )

    def default(self, height: int, width: int) -> tuple[int, int]:
        """What the numbers are in sampling a picture of this shape."""
        return (0, 0) if self.key == "crop_corner" else (height, width)

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        waves = self.features(batch[self.key].flatten().float()).unflatten(0, (-1, 2))
        return Cond(self.project(waves.flatten(1).to(self.project[0].weight)))


class Label(nn.Module):
    """Embeds a class label [b] as a vector (ADM, 2105.05233).

    Args:
        classes: how many there are.
        dim: size of the vector.
        learned_null: whether the replacement of a dropped label is learned; otherwise zeros.
        key: the batch key.
    """

    def __init__(self, classes: int, dim: int, learned_null: bool = True, key: str = "label"):
        super().__init__()
        self.key, self.dim, self.size = key, dim, dim
        self.null: Tensor
        set_null(self, learned_null)
        self.embed = nn.Embedding(classes, dim)

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        return Cond(torch.where(keep[:, None], self.embed(batch[self.key]), self.null))
