"""Analytic-DPM (2201.06503): the optimal variance of a trained network's reverse process.

Averaged over dimensions and data, the variance of x0 given x_t is sigma^2 / alpha^2 (1 - ms_eps),
where ms_eps is the mean square of eps_hat (theorem 1). It depends on the noise level alone and is
measured on training samples after training. unCLIP samples its prior with it (appendix C).
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.diffusion.gaussian import Denoised, Net, Process, Targets
from cascade.diffusion.noise import Noise, Schedule, alpha_sigma, table, table_index


def x0_variance(
    unexplained: Float[Tensor, "*b"], logsnr: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """Variance of x0 given x_t, from 1 - ms_eps.

    Clamped to at most 1, the greatest variance that numbers in [-1, 1] can have.
    """
    return ((-logsnr).exp() * unexplained).clamp(0, 1)


class AnalyticVariance(nn.Module):
    """Wraps a `Process` so that its denoiser returns the variance of x0 as well.

    It is a module, so that the measurement is saved with the stage's weights:
    log((1 - ms_eps) / ms_eps) at levels even in u, with linear interpolation in between, since on
    Gaussian data it is linear in logsnr. Until `measure` is called the variance is 0, and sampling
    equals that of the wrapped process.

    Args:
        process: the wrapped process, whose training does not change.
        levels: number of noise levels at which ms_eps is measured.
    """

    process: Process
    log_odds: Tensor

    def __init__(self, process: Process, levels: int = 64):
        super().__init__()
        self.process = process
        self.register_buffer("log_odds", torch.full((levels,), -1e4))

    @property
    def schedule(self) -> Schedule:
        return self.process.schedule

    def loss(
        self,
        net: Net,
        x0: Float[Tensor, "b *d"],
        cond: Any,
        noise: Noise,
        teacher: Targets | None = None,
    ) -> Float[Tensor, " b"]:
        return self.process.loss(net, x0, cond, noise, teacher)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """Denoises as the wrapped process does, and adds `var`."""
        denoised = self.process.denoise(net, x_t, logsnr, cond)
        place = table_index(logsnr, table(self.schedule, len(self.log_odds)))
        left, right = self.log_odds[place.floor().long()], self.log_odds[place.ceil().long()]
        unexplained = torch.lerp(left, right, (place % 1).to(left)).sigmoid()
        var = x0_variance(unexplained, logsnr).to(denoised.x0).expand_as(denoised.x0)
        return denoised._replace(var=var)

    @torch.no_grad()
    def measure(
        self, net: Net, examples: Iterable[tuple[Tensor, Any, Noise]], rounds: int = 2
    ) -> None:
        """Measures the trained network on `rounds` batches at each level.

        If eps_hat is the conditional mean, 1 - ms_eps equals the mean square of eps - eps_hat. That
        is measured instead, because 1 - ms_eps is lost in sampling noise where it is small.

        Args:
            examples: x0 [b, ...], condition and noise of successive batches; as many are taken as
                needed.
        """
        count = len(self.log_odds)
        levels = table(self.schedule, count)
        residual, predicted = torch.zeros(2, count, dtype=torch.float64)
        for k, (x0, cond, noise) in enumerate(islice(examples, rounds * count)):
            logsnr = levels[k % count]
            alpha, sigma = alpha_sigma(logsnr)
            eps = noise(tuple(x0.shape)).to(x0)
            x0_hat = self.process.denoise(net, alpha * x0 + sigma * eps, logsnr, cond).x0
            error = alpha / sigma * (x0_hat - x0)  # eps - eps_hat
            residual[k % count] += error.square().mean().cpu()
            predicted[k % count] += (eps - error).square().mean().cpu()
        self.log_odds.copy_((residual / predicted).log().clamp(-1e4, 1e4))
