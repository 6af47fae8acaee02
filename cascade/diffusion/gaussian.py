"""The central page: a Gaussian diffusion, its training loss and its denoiser.

A network is called F = net(c_in x_t, logsnr [b], cond); the loss is computed on F and weighted in
x0 space, since |x0_hat - x0|^2 = c_out^2 |F - F*|^2. Coefficients are float64, data stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.noise import Noise, Schedule, alpha_sigma, cosine
from cascade.diffusion.prediction import Coeffs, v

Net = Callable[[Float[Tensor, "b *d"], Float[Tensor, " b"], Any], Float[Tensor, "b *d"]]


def per_sample(c: Float[Tensor, " b"], x: Float[Tensor, "b *d"]) -> Float[Tensor, "b ..."]:
    """One number for each sample, in the precision of x and shaped to multiply it."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Denoised(NamedTuple):
    """What is known of x0 given x_t: its mean, and where a network learned it, its variance."""

    x0: Float[Tensor, "b *d"]
    var: Float[Tensor, "b *d"] | None = None


Denoiser = Callable[[Float[Tensor, "b *d"], Float[Tensor, ""]], Denoised]


@runtime_checkable
class Process(Protocol):
    """What a stage trains with and a sampler inverts."""

    schedule: Schedule

    def loss(
        self, net: Net, x0: Float[Tensor, "b *d"], cond: Any, noise: Noise
    ) -> Float[Tensor, " b"]: ...

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised: ...


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving diffusion: a `Process`.

    Args:
        schedule: u -> logsnr; training draws u uniformly.
        prediction: what F is.
        weight: of |x0_hat - x0|^2, a function of logsnr; None: plain MSE on F.
    """

    schedule: Schedule = cosine
    prediction: Callable[[Tensor], Coeffs] = v
    weight: Callable[[Tensor], Tensor] | None = None

    def loss(
        self, net: Net, x0: Float[Tensor, "b *d"], cond: Any, noise: Noise
    ) -> Float[Tensor, " b"]:
        """The loss of each sample, a mean over its dimensions.

        Args:
            noise: drawn from twice: one number per sample for u, then eps.
        """
        # By the normal CDF, so that one source gives all; in float64 u never rounds to 0 or 1.
        u = torch.special.ndtr(noise((len(x0),)).double())
        logsnr = self.schedule(u)
        eps = noise(tuple(x0.shape)).to(x0)
        alpha, sigma = alpha_sigma(logsnr)
        c_in, c_skip, c_out = self.prediction(logsnr)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
        F = self._call(net, per_sample(c_in, x0) * x_t, logsnr, cond)
        # F* = (x0 - c_skip x_t) / c_out, with the large terms cancelled before data is rounded
        F_star = (
            per_sample((1 - alpha * c_skip) / c_out, x0) * x0
            - per_sample(c_skip * sigma / c_out, x0) * eps
        )
        loss = (F - F_star).square().flatten(1).mean(1)
        if self.weight is None:
            return loss
        return loss * (self.weight(logsnr) * c_out.square()).to(loss.dtype)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """x0_hat at one noise level for all of the batch.

        Raises:
            ValueError: eps-prediction is asked at logsnr = -inf.
        """
        c_in, c_skip, c_out = self.prediction(logsnr)
        if not c_skip.isfinite():
            raise ValueError("eps-prediction at logsnr = -inf: start from a finite one, or use v")
        F = self._call(net, c_in * x_t, logsnr.expand(len(x_t)), cond)
        return Denoised(c_skip * x_t + c_out * F)

    @staticmethod
    def _call(
        net: Net, x: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"], cond: Any
    ) -> Float[Tensor, "b *d"]:
        # Under autocast F may come in half precision; the rest is done in that of the data.
        return net(x, logsnr.clamp(-20, 20).to(x), cond).to(x.dtype)
