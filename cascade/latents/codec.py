"""The codec of latent stages: pictures as latents of a frozen autoencoder."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.batch import Batch, image_key
from cascade.codecs import moments
from cascade.draws import Draws
from cascade.errors import UserError
from cascade.latents.frozen import FrozenAutoencoder


class Latent(nn.Module):
    """Latents of pictures, each channel with zero mean and unit variance (2112.10752, appendix G).

    The mean and the standard deviation of each channel are those of the training data; they are
    buffers and so part of the checkpoint.

    Args:
        size: side of the pictures, in pixels; written as `image_{size}`.
        channels: of the latents.
        factor: side of the square of pixels for each latent.
        autoencoder: maps pictures to latents, and back.
        drawn: whether training draws latents from their distributions, with other draws for each
            sample; otherwise it takes their means.
        seed: of these draws.

    Raises:
        UserError: `factor` does not divide the side.
    """

    buckets = None  # squares alone

    def __init__(
        self,
        size: int,
        channels: int,
        factor: int,
        autoencoder: FrozenAutoencoder,
        drawn: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if size % factor:
            raise UserError(
                f"size={size} is no multiple of autoencoder.factor={factor}: change size"
            )
        self.size, self.channels, self.side = size, channels, size // factor
        self.writes, self.drawn, self.seed = image_key(size), drawn, seed
        self.factor, self.autoencoder = factor, autoencoder
        self.shapes = [(size, size)]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def frozen(self) -> tuple[FrozenAutoencoder, ...]:
        """What it computes with, but no checkpoint holds."""
        return (self.autoencoder,)

    def check(self) -> None:
        """Raises UserError if the folder holds no autoencoder, or another than was configured."""
        source = self.autoencoder.source
        for name, own, theirs in (
            ("autoencoder.latent", self.channels, source.latent),
            ("autoencoder.factor", self.factor, source.factor),
        ):
            if own != theirs:
                raise UserError(f"{name}={own}, but that of {source.config} is {theirs}: set it so")

    def check_sampler(self, sampler: Any) -> None:
        """Raises UserError if a sampler clips x0, as only pixels may be."""
        if getattr(sampler, "threshold", None) is not None:
            raise UserError(
                "this stage samples latents, which a threshold would falsify: choose "
                "sampler=latent, or sampler.threshold=null"
            )

    def fit(self, batches: Iterable[Batch]) -> None:
        """Takes the mean and standard deviation of each channel, over pictures and positions."""
        mean, covariance = moments(
            self._latents(batch).movedim(1, 3).flatten(0, 2) for batch in batches
        )
        self.mean.copy_(mean)
        self.std.copy_(covariance.diag().sqrt().clamp(min=1e-4))

    def encode(self, batch: Batch) -> Float[Tensor, "b c h w"]:
        mean, std = self._statistics
        return (self._latents(batch) - mean) / std

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        mean, std = self._statistics
        autoencoder = self.autoencoder.to(x0.device)
        return autoencoder.decode(x0.float() * std + mean).clamp(-1, 1)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        return self.channels, self.side, self.side

    @property
    def _statistics(self) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        return self.mean[:, None, None], self.std[:, None, None]

    def _latents(self, batch: Batch) -> Float[Tensor, "b c h w"]:
        x = batch[self.writes]
        posterior = self.autoencoder.to(x.device).posterior(x)
        if not (self.drawn and self.training):
            return posterior.mean
        draws = Draws(self.seed, f"{self.writes}/posterior", batch["sample"], x.device)
        return posterior.drawn(draws(posterior.mean.shape))
