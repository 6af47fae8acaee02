"""The embedder of a low-resolution picture, and the ways to enlarge it."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.batch import Batch, image_key
from cascade.conditioning.cond import Cond
from cascade.conditioning.vectors import Fourier


def enlarge(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Enlarges by a whole factor, bicubically."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic")


def enlarge_antialiased(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Enlarges as Karlo does: bicubically with a = -0.5, the kernel of anti-aliased resizing."""
    return F.interpolate(x, scale_factor=factor, mode="bicubic", antialias=True)


def enlarge_linear(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Enlarges as GLIDE and ADM do: bilinearly."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear")


def enlarge_aligned(x: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c H W"]:
    """Enlarges as DeepFloyd IF does: bilinearly, with the centres of corner pixels aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


class LowRes(nn.Module):
    """The low-resolution picture, enlarged, as `image`, and its noise level as `vector`.

    Reads `image_{low}` [b, 3, h, w] and `image_{low}_level` [b], which a `Corruption` writes.
    Neither is ever dropped (SR3; Imagen, section 2.5).

    Args:
        low, size: sides of the small and the large picture, in pixels.
        dim: size of the level's embedding.
        told: whether the network is told the level (ADM, GLIDE and Karlo do not).
        level: embeds the level; None: one layer over its Fourier features.
        enlarge: (x, factor) -> the enlarged picture.
        rounded: round the small picture to 8 bits first (GLIDE).
    """

    def __init__(
        self,
        low: int,
        size: int,
        dim: int,
        told: bool = True,
        level: nn.Module | None = None,
        enlarge: Callable[[Tensor, int], Tensor] = enlarge,
        rounded: bool = False,
    ):
        super().__init__()
        self.key, self.factor = image_key(low), size // low
        self.enlarge, self.rounded = enlarge, rounded
        self.dim, self.level = dim if told else None, None
        if told:
            self.level = level or nn.Sequential(Fourier(dim // 2), nn.Linear(dim // 2, dim))

    def forward(self, batch: Batch, keep: Bool[Tensor, " b"]) -> Cond:
        x = batch[self.key]
        if self.rounded:
            x = ((x + 1) * 127.5).round() / 127.5 - 1
        level = self.level(batch[f"{self.key}_level"]) if self.level else None
        return Cond(vector=level, image=self.enlarge(x, self.factor))
