"""Analytic-DPM's variance (2201.06503): optimal for a trained network, and not trained.

The variance of x0 given x_t, a mean over dimensions and data, is sigma^2 / alpha^2 (1 - ms_eps),
where ms_eps is the mean square of eps_hat. A function of the noise level alone, it is measured on
training samples when training has finished. unCLIP's prior is sampled with it (appendix C).
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cascade.diffusion.gaussian import Denoised, Net, Process
from cascade.diffusion.noise import Noise, Schedule, alpha_sigma, table, table_index


def x0_variance(
    unexplained: Float[Tensor, "*b"], logsnr: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """Of x0 given x_t, from 1 - ms_eps; at most 1, the greatest variance of numbers in [-1, 1]."""
    return ((-logsnr).exp() * unexplained).clamp(0, 1)


class AnalyticVariance(nn.Module):
    """A `Process`: another one, whose denoiser tells the variance of x0 too.

    A module, so that what is measured is saved with the stage's weights: log((1 - ms_eps) / ms_eps)
    at levels even in u, between which it is interpolated. That is linear in logsnr on Gaussian
    data. Before `measure` the variance is 0, and the process is the one inside.

    Args:
        process: trained as it is.
        levels: at which ms_eps is measured.
    """

    def __init__(self, process: Process, levels: int = 64):
        super().__init__()
        self.process = process
        self.register_buffer("log_odds", torch.full((levels,), -1e4))

    @property
    def schedule(self) -> Schedule:
        return self.process.schedule

    def loss(
        self, net: Net, x0: Float[Tensor, "b *d"], cond: Any, noise: Noise
    ) -> Float[Tensor, " b"]:
        return self.process.loss(net, x0, cond, noise)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """As the process inside, and `var`."""
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
        """Measures the trained network, with `rounds` batches at each level.

        For a conditional mean, 1 - ms_eps is the mean square of eps - eps_hat, which is measured
        instead: where it is small the difference drowns in noise.

        Args:
            examples: x0 [b, ...], condition and noise of one batch after another, as many as asked.
        """
        count = len(self.log_odds)
        levels = table(self.schedule, count)
        missed, said = torch.zeros(2, count, dtype=torch.float64)
        for k, (x0, cond, noise) in enumerate(islice(examples, rounds * count)):
            logsnr = levels[k % count]
            alpha, sigma = alpha_sigma(logsnr)
            eps = noise(tuple(x0.shape)).to(x0)
            x0_hat = self.process.denoise(net, alpha * x0 + sigma * eps, logsnr, cond).x0
            error = alpha / sigma * (x0_hat - x0)  # eps - eps_hat
            missed[k % count] += error.square().mean().cpu()
            said[k % count] += (eps - error).square().mean().cpu()
        self.log_odds.copy_((missed / said).log().clamp(-1e4, 1e4))
