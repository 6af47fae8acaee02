"""The central page: a Gaussian diffusion, its training loss and its denoiser.

A network is called as F = net(c_in x_t, logsnr [b], cond). The loss is computed on F and weighted
in x0 space, since |x0_hat - x0|^2 = c_out^2 |F - F*|^2. Coefficients are float64; data keeps its
dtype.
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
    """Casts one number per sample to the dtype of x, and shapes it to broadcast against x."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def call(
    net: Net, x: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"], cond: Any
) -> Float[Tensor, "b ..."]:
    """Calls the network, and casts its output back to the dtype of x in case of autocast."""
    return net(x, logsnr.clamp(-LIMIT, LIMIT).to(x), cond).to(x.dtype)


# Replaces the targets F* of some samples, given the network's input and its noise level.
Targets = Callable[
    [Float[Tensor, "b *d"], Float[Tensor, " b"], Float[Tensor, "b *d"]], Float[Tensor, "b *d"]
]


class Denoised(NamedTuple):
    """A denoiser's estimate of x0 given x_t: its mean, and a variance if one is known.

    Attributes:
        x0: the mean.
        var: the variance of x0 (Analytic-DPM).
        range: iDDPM's learned variance of a step, as a position in [0, 1] between the logarithms of
            its lower and upper bound (`posterior.log_variance`).
    """

    x0: Float[Tensor, "b *d"]
    var: Float[Tensor, "b *d"] | None = None
    range: Float[Tensor, "b *d"] | None = None


Denoiser = Callable[[Float[Tensor, "b *d"], Float[Tensor, ""]], Denoised]


@runtime_checkable
class Process(Protocol):
    """A noising process: a stage trains on its loss, and a sampler inverts it."""

    schedule: Schedule

    def loss(
        self,
        net: Net,
        x0: Float[Tensor, "b *d"],
        cond: Any,
        noise: Noise,
        teacher: Targets | None = None,
    ) -> Float[Tensor, " b"]: ...

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised: ...


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving diffusion: a `Process`.

    Args:
        schedule: maps u to logsnr; training draws u uniformly.
        prediction: which quantity F predicts, as coefficients (`prediction`).
        weight: weight of |x0_hat - x0|^2 as a function of logsnr (`weighting`); None: plain MSE on
            F.
        most: the greatest weight of |F - F*|^2 that `weight` may lead to; None: there is none. It
            is unbounded where prediction and loss live in different spaces. JiT's is 400, as it
            clips denominators at 0.05 (2511.13720).
    """

    schedule: Schedule = cosine
    prediction: Callable[[Tensor], Coeffs] = v
    weight: Callable[[Tensor], Tensor] | None = None
    most: float | None = None

    def loss(
        self,
        net: Net,
        x0: Float[Tensor, "b *d"],
        cond: Any,
        noise: Noise,
        teacher: Targets | None = None,
    ) -> Float[Tensor, " b"]:
        """The loss of each sample, a mean over its dimensions.

        Args:
            noise: called twice: for one number per sample, which gives u, then for eps.
            teacher: replaces targets; None: they are those of x0.
        """
        logsnr = self.schedule(uniform(noise, (len(x0),)))
        x, F_star = self.task(x0, noise(tuple(x0.shape)).to(x0), logsnr)
        F_star = F_star if teacher is None else teacher(x, logsnr, F_star)
        return self.weighted(call(net, x, logsnr, cond) - F_star, logsnr)

    def task(
        self, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
        """The network's input, c_in x_t, and its target, F* = (x0 - c_skip x_t) / c_out.

        So F - F* = (x0_hat - x0) / c_out.
        """
        alpha, sigma = alpha_sigma(logsnr)
        c_in, c_skip, c_out = self.prediction(logsnr)
        x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
        # With x_t expanded, the large terms of F* cancel in float64, before data is rounded.
        F_star = (
            per_sample((1 - alpha * c_skip) / c_out, x0) * x0
            - per_sample(c_skip * sigma / c_out, x0) * eps
        )
        return per_sample(c_in, x0) * x_t, F_star

    def weighted(
        self, error: Float[Tensor, "b *d"], logsnr: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """The mean square of the error F - F*, weighted."""
        loss = error.square().flatten(1).mean(1)
        if self.weight is None:
            return loss
        c_out = self.prediction(logsnr).c_out
        weight = self.weight(logsnr) * c_out.square()
        weight = weight if self.most is None else weight.clamp(max=self.most)
        return loss * weight.to(loss.dtype)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """Estimates x0 at one noise level, which is the same for the whole batch.

        Raises:
            ValueError: eps-prediction at logsnr = -inf, where F does not determine x0.
        """
        c_in = self.prediction(logsnr).c_in
        F = call(net, c_in * x_t, logsnr.expand(len(x_t)), cond)
        return Denoised(self.x0_hat(F, x_t, logsnr))

    def x0_hat(
        self, F: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]
    ) -> Float[Tensor, "b *d"]:
        """c_skip x_t + c_out F; raises as `denoise` does."""
        _, c_skip, c_out = self.prediction(logsnr)
        if not c_skip.isfinite():
            raise ValueError("eps-prediction at logsnr = -inf: start from a finite one, or use v")
        return c_skip * x_t + c_out * F
