"""The variational bound on -log p(x0), in bits per dimension (DDPM, equation 5; iDDPM, section 2).

For a process of T steps it is L_T + L_{T-1} + ... + L_0: the KL divergence of the last state from
pure noise, that of each sampler step from the true posterior, and the likelihood of 8-bit pictures
in [-1, 1] under the final step.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from cascade.diffusion.gaussian import Denoised, Net, Process
from cascade.diffusion.noise import Noise, alpha_sigma
from cascade.diffusion.posterior import Step, ladder, log_variance


class Bound(NamedTuple):
    """The bound of each sample, in bits per dimension: L_T, and L_0 to L_{T-1}."""

    prior: Float[Tensor, " b"]
    steps: Float[Tensor, "b t"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        return self.prior + self.steps.sum(1)


def normal_kl(
    mean: Float[Tensor, "*#d"],
    log_var: Float[Tensor, "*#d"],
    other_mean: Float[Tensor, "*#d"],
    other_log_var: Float[Tensor, "*#d"],
) -> Float[Tensor, "..."]:
    """KL(first || other) of two diagonal Gaussians, elementwise, in nats."""
    ratio = log_var - other_log_var
    moved = (mean - other_mean).square() * (-other_log_var).exp()
    return 0.5 * (ratio.exp() - 1 - ratio + moved)


def discretized_nll(
    x0: Float[Tensor, "b *d"], mean: Float[Tensor, "b *d"], log_var: Float[Tensor, "..."]
) -> Float[Tensor, "b *d"]:
    """Negative log of a Gaussian's mass in the bin, 2 / 255 wide, of each 8-bit value, in nats.

    DDPM, equation 13, with the exact normal CDF. The outermost bins extend to infinity; the mass is
    clamped to at least 1e-12.
    """
    precision = (-log_var / 2).exp()
    above = torch.special.ndtr((x0 - mean + 1 / 255) * precision)
    below = torch.special.ndtr((x0 - mean - 1 / 255) * precision)
    above = torch.where(x0 > 0.999, 1.0, above)
    below = torch.where(x0 < -0.999, 0.0, below)
    return -(above - below).clamp(min=1e-12).log()


def term(
    x0: Float[Tensor, "b *d"], denoised: Denoised, step: Step, first: Bool[Tensor, "..."]
) -> Float[Tensor, " b"]:
    """L_t of one reverse step, in bits per dimension.

    Args:
        step: its entries broadcast against x0.
        first: true where the step leads to clean data, so that the term is L_0.
    """
    log_var = log_variance(denoised, step)
    kl = normal_kl(step.of_x0 * x0, step.log_clipped, step.of_x0 * denoised.x0, log_var)
    nats = torch.where(first, discretized_nll(x0, denoised.x0, log_var), kl)
    return nats.flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def bound(
    process: Process, net: Net, x0: Float[Tensor, "b *d"], cond: Any, noise: Noise, steps: int
) -> Bound:
    """The bound of each sample for an ancestral sampler of this many steps.

    Calls the network once per step.

    Args:
        noise: called once per step.
    """
    levels, down = ladder(process.schedule, steps)
    terms = []
    for i, logsnr in enumerate(levels):
        alpha, sigma = alpha_sigma(logsnr)
        x_t = alpha * x0 + sigma * noise(tuple(x0.shape)).to(x0)
        denoised = process.denoise(net, x_t, logsnr, cond)
        step = Step(*(part[i] for part in down))
        terms.append(term(x0, denoised, step, torch.tensor(i == 0, device=x0.device)))
    zero = torch.zeros_like(alpha)
    prior = normal_kl(alpha * x0, logsigmoid(-logsnr), zero, zero)
    return Bound(prior.flatten(1).mean(1) / math.log(2), torch.stack(terms, 1))
