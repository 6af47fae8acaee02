"""Trains an autoencoder of pictures, which latent stages then use frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.batch import Batch, image_key
from cascade.draws import Draws
from cascade.encoders.weights import reading
from cascade.errors import UserError
from cascade.latents.autoencoder import Architecture, commitment
from cascade.latents.frozen import WEIGHTS, read_autoencoder, save_autoencoder
from cascade.trainable import Trainable


class AutoencoderTraining(Trainable):
    """Trains an autoencoder on `image_{size}`.

    The loss is the reconstruction's per number of the picture, plus, of Gaussian latents,
    `kl` times their divergence from a standard normal distribution per number of the picture
    (2112.10752, appendix G), or, of quantised ones, the codebook's and `beta` times the encoder's
    commitment. A perceptual and an adversarial loss can be attached.

    Args:
        autoencoder: the sizes of the autoencoder.
        size: side of the pictures, in pixels.
        optimizer: creates an optimizer for parameter groups.
        learning_rate: factor of the learning rate after a number of images; None: constant.
        batch: global batch size, to count images.
        distance: between a picture and its reconstruction: absolute ("l1") or squared ("l2").
        kl: weight of the divergence.
        beta: weight of the commitment.
        seed: of the draws of latents.

    Raises:
        UserError: the autoencoder does not divide the side.
    """

    def __init__(
        self,
        autoencoder: Architecture,
        size: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        learning_rate: Callable[[int], float] | None = None,
        batch: int = 1,
        distance: Literal["l1", "l2"] = "l1",
        kl: float = 1e-6,
        beta: float = 0.25,
        seed: int = 0,
    ):
        super().__init__(optimizer, learning_rate, batch)
        if size % autoencoder.factor:
            raise UserError(
                f"size={size} is no multiple of autoencoder.factor={autoencoder.factor}: change one"
            )
        self.architecture, self.autoencoder = autoencoder, autoencoder.build()
        self.size, self.distance, self.kl, self.beta, self.seed = size, distance, kl, beta, seed

    @property
    def writes(self) -> str:
        """The batch key of the pictures."""
        return image_key(self.size)

    @property
    def columns(self) -> tuple[str, ...]:
        more = ("discriminator",) if "adversarial" in self.further else ()
        return ("reconstruction", "latents", *self.further, *more)

    def reconstructed(self, batch: Batch, noise: Callable[..., Tensor] | None = None) -> Any:
        """Encodes and decodes pictures; returns them, their posterior, and the latents.

        Args:
            noise: draws the latents; None: they are the posterior's means.
        """
        posterior = self.autoencoder.posterior(batch[self.writes])
        z = posterior.mean if noise is None else posterior.drawn(noise(posterior.mean.shape))
        return self.autoencoder.decode(z), posterior, z

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The sum of all losses, means over the batch."""
        x = batch[self.writes]
        y, posterior, z = self.reconstructed(
            batch, Draws(self.seed, "posterior", batch["sample"], self.device)
        )
        with torch.autocast(x.device.type, enabled=False):
            y = y.float()
            apart = (x - y).abs() if self.distance == "l1" else (x - y).square()
            latents = self.kl * posterior.kl / x[0].numel()
            latents = latents + commitment(self.autoencoder, z.float(), self.beta)
            parts: dict[str, Tensor | None] = {
                "reconstruction": apart.mean(),
                "latents": latents.mean(),
            }
            attached: dict[str, Any] = dict(self.further.items())
            if perceptual := attached.get("perceptual"):
                on = perceptual.active(self.done)
                parts["perceptual"] = perceptual.between(y, x).mean() if on else None
            others = sum(part for part in parts.values() if part is not None)
            total = others
            if judge := attached.get("adversarial"):
                scores = (
                    judge(x, y, others, self.autoencoder.last) if judge.active(self.done) else None
                )
                parts["adversarial"] = scores and scores.deceived
                parts["discriminator"] = scores and scores.discriminator
                total = others + (sum(scores) if scores else judge.idle())
        self.terms = {name: part if part is None else part.detach() for name, part in parts.items()}
        return total

    def training_step(self, batch: Batch, number: int) -> Tensor:
        return self.loss(batch)

    def attach(self, name: str, further: Any) -> None:
        """Adds a loss for the training; raises as its `attached` does."""
        self.further[name] = further.attached(self)

    def groups(self) -> list[dict[str, Any]]:
        """The autoencoder's parameters, and the discriminator's."""
        own = list(self.autoencoder.parameters())
        theirs = list(self.further.parameters())
        return [{"params": own}, *([{"params": theirs}] if theirs else [])]

    @torch.no_grad()
    def sample(self, batch: Batch, seed: int) -> Float[Tensor, "b 3 h w"]:
        """The reconstructions of the batch's pictures; nothing is drawn."""
        return self.reconstructed(batch)[0].clamp(-1, 1)

    def export(self, run: Path) -> None:
        """Writes the current weights, in the format that `FrozenAutoencoder` reads."""
        if self.rank == 0:
            save_autoencoder(self.architecture, self.autoencoder, run)

    def restore(self, run: Path, of: str | None = None) -> None:
        if not (run / WEIGHTS).exists():
            raise UserError(f"{run} holds no {WEIGHTS}: train it first")
        with reading([run / WEIGHTS], str(run)):
            read_autoencoder(self.autoencoder, run / WEIGHTS, of or "autoencoder.model")
