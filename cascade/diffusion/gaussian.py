"""The central page: a Gaussian diffusion, its training loss and its denoiser.

A network is called F = net(c_in x_t, logsnr [b], cond); the loss is computed on F and weighted in
x0 space, since |x0_hat - x0|^2 = c_out^2 |F - F*|^2. Coefficients are float64, data stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.noise import LIMIT, Noise, Schedule, alpha_sigma, cosine, uniform
from cascade.diffusion.prediction import Coeffs, v

Net = Callable[[Float[Tensor, "b *d"], Float[Tensor, " b"], Any], Float[Tensor, "b *d"]]


def per_sample(c: Float[Tensor, " b"], x: Float[Tensor, "b *d"]) -> Float[Tensor, "b ..."]:
    """One number for each sample, in the precision of x and shaped to multiply it."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def call(
    net: Net, x: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"], cond: Any
) -> Float[Tensor, "b ..."]:
    """What the network says, in the precision of the data: autocast may give half of that."""
    return net(x, logsnr.clamp(-LIMIT, LIMIT).to(x), cond).to(x.dtype)


class Denoised(NamedTuple):
    """What is known of x0 given x_t: its mean, and a variance if one was learned or measured.

    `var` is that of x0. `range` is what iDDPM learns (`posterior.log_variance`): where the log
    variance of a step lies, from 0, the least that it can be, to 1, the most.
    """

    x0: Float[Tensor, "b *d"]
    var: Float[Tensor, "b *d"] | None = None
    range: Float[Tensor, "b *d"] | None = None


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
        logsnr = self.schedule(uniform(noise, (len(x0),)))
        x, F_star = self.task(x0, noise(tuple(x0.shape)).to(x0), logsnr)
        return self.weighted(call(net, x, logsnr, cond) - F_star, logsnr)

    def task(
        self, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
        """What the network sees, c_in x_t, and what it should say, F* = (x0 - c_skip x_t) / c_out.

        (x0_hat - x0) / c_out is F - F*.
        """
        alpha, sigma = alpha_sigma(logsnr)
        c_in, c_skip, c_out = self.prediction(logsnr)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
        # The large terms of F* are cancelled before data is rounded.
        F_star = (
            per_sample((1 - alpha * c_skip) / c_out, x0) * x0
            - per_sample(c_skip * sigma / c_out, x0) * eps
        )
        return per_sample(c_in, x0) * x_t, F_star

    def weighted(
        self, error: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The mean square of F - F*, with the weight."""
        loss = error.square().flatten(1).mean(1)
        if self.weight is None:
            return loss
        c_out = self.prediction(logsnr).c_out
        return loss * (self.weight(logsnr) * c_out.square()).to(loss.dtype)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """x0_hat at one noise level for all of the batch.

        Raises:
            ValueError: eps-prediction is asked at logsnr = -inf.
        """
        c_in = self.prediction(logsnr).c_in
        F = call(net, c_in * x_t, logsnr.expand(len(x_t)), cond)
        return Denoised(self.x0_hat(F, x_t, logsnr))

    def x0_hat(
        self, F: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]
    ) -> Float[Tensor, "b *d"]:
        """What F says of x0; raises as `denoise` does."""
        _, c_skip, c_out = self.prediction(logsnr)
        if not c_skip.isfinite():
            raise ValueError("eps-prediction at logsnr = -inf: start from a finite one, or use v")
        return c_skip * x_t + c_out * F
