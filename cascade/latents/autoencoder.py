"""A convolutional autoencoder of pictures, whose latents are Gaussian (KL) or quantised (VQ).

Pictures are [b, 3, h, w] in [-1, 1], latents [b, latent, h / factor, w / factor].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets.blocks import Block, Resample
from cascade.nets.layers import GroupNorm


class Posterior(NamedTuple):
    """The latents of pictures: a mean, and a standard deviation if they are Gaussian."""

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"] | None = None

    def drawn(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.mean if self.std is None else self.mean + self.std * noise

    @property
    def kl(self) -> Float[Tensor, " b"]:
        """The divergence from a standard normal distribution, in nats (1312.6114, appendix B)."""
        if self.std is None:
            return self.mean.new_zeros(len(self.mean))
        variance = self.std.square()
        each = (self.mean.square() + variance - 1 - variance.log()) / 2
        return each.flatten(1).sum(1)


class Codebook(nn.Module):
    """Vector quantisation (1711.00937, section 3.1).

    Args:
        codes: number of entries.
        channels: size of an entry.
    """

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.entries = nn.Parameter(torch.randn(codes, channels))

    def nearest(self, z: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b h w"]:
        """The entry nearest to each latent, by the squared distance."""
        rows = z.movedim(1, 3)
        apart = self.entries.square().sum(1) - 2 * rows @ self.entries.T
        return apart.argmin(3)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The entries themselves, with gradients to them and none to z."""
        return self.entries[self.nearest(z.detach())].movedim(3, 1)


@dataclass(frozen=True)
class Architecture:
    """The size of an autoencoder.

    Args:
        channels: at the finest level.
        multipliers: factors of `channels`, one per level; each level halves the resolution.
        latent: channels of the latents.
        factor: side of the square of pixels for each latent. What the levels do not halve is folded
            into channels first.
        blocks: residual blocks per level and direction.
        codes: entries of the codebook; 0: latents are Gaussian.

    Raises:
        UserError: the levels do not divide `factor`.
    """

    channels: int
    multipliers: Sequence[int]
    latent: int
    factor: int
    blocks: int = 1
    codes: int = 0

    def __post_init__(self):
        halved = 2 ** (len(self.multipliers) - 1)
        if self.factor % halved:
            raise UserError(
                f"autoencoder.factor={self.factor} is no multiple of {halved}, by which the "
                f"{len(self.multipliers)} levels of autoencoder.model.multipliers reduce it: "
                "change one of them"
            )

    @property
    def patch(self) -> int:
        """Side of the squares of pixels folded into channels."""
        return self.factor // 2 ** (len(self.multipliers) - 1)

    def build(self) -> "Autoencoder":
        return Autoencoder(self)


class _Layers(nn.Sequential):
    """Blocks that read neither a noise level nor a condition."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x, None, Cond()) if isinstance(layer, (Block, Resample)) else layer(x)
        return x


class _Activated(GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.activated(x)


class Autoencoder(nn.Module):
    """An encoder and a decoder of residual blocks, as in latent diffusion (2112.10752, appendix G).

    There is no attention, so that it applies to pictures of any side that `factor` divides.
    """

    def __init__(self, sizes: Architecture):
        super().__init__()
        self.sizes = sizes
        widths = [sizes.channels * m for m in sizes.multipliers]
        pixels = 3 * sizes.patch**2
        outputs = sizes.latent * (1 if sizes.codes else 2)
        down: list[nn.Module] = [nn.Conv2d(pixels, widths[0], 3, padding=1)]
        c = widths[0]
        for i, width in enumerate(widths):
            down += [Resample(c, 0.5)] if i else []
            for _ in range(sizes.blocks):
                down.append(Block(c, width, None))
                c = width
        self.encoder = _Layers(*down, _Activated(c), nn.Conv2d(c, outputs, 3, padding=1))
        up: list[nn.Module] = [nn.Conv2d(sizes.latent, c, 3, padding=1)]
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(sizes.blocks):
                up.append(Block(c, width, None))
                c = width
            up += [Resample(c, 2.0)] if i else []
        self.decoder = _Layers(*up, _Activated(c), nn.Conv2d(c, pixels, 3, padding=1))
        self.codebook = Codebook(sizes.codes, sizes.latent) if sizes.codes else None

    @property
    def last(self) -> nn.Parameter:
        """The weights of the layer that makes pictures."""
        return self.decoder[-1].weight

    def posterior(self, x: Float[Tensor, "b 3 h w"]) -> Posterior:
        """The latents of pictures, before quantisation."""
        h = self.encoder(F.pixel_unshuffle(x, self.sizes.patch)).to(x.dtype)
        if self.codebook is not None:
            return Posterior(h)
        mean, log_variance = h.chunk(2, 1)
        return Posterior(mean, (log_variance.clamp(-30, 20) / 2).exp())

    def quantised(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The latents that the decoder reads, with gradients straight through to z."""
        if self.codebook is None:
            return z
        return z + (self.codebook(z) - z).detach()

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return F.pixel_shuffle(self.decoder(self.quantised(z)), self.sizes.patch)


def commitment(
    autoencoder: Autoencoder, z: Float[Tensor, "b c h w"], beta: float
) -> Float[Tensor, " b"]:
    """The codebook's loss, and beta times the encoder's commitment (1711.00937, equation 3)."""
    if autoencoder.codebook is None:
        return z.new_zeros(len(z))
    q = autoencoder.codebook(z)
    both = (q - z.detach()).square() + beta * (z - q.detach()).square()
    return both.flatten(1).mean(1)


def psnr(x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """The peak signal-to-noise ratio of pictures in [-1, 1], in dB, of each pair."""
    error = (x - y).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-12) / 4)
