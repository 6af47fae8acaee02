"""The reverse step from level t to a cleaner level s, in closed form (DDPM, equations 6 and 7).

q(x_s | x_t, x0) is Gaussian, with a mean affine in x0 and x_t. A sampler draws from p(x_s | x_t),
which has x0_hat in place of x0, and possibly a larger variance.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import logsigmoid

from cascade.diffusion.gaussian import Denoised
from cascade.diffusion.noise import Schedule, alpha_sigma, table


class Step(NamedTuple):
    """Coefficients of q(x_s | x_t, x0) = N(of_x0 x0 + of_xt x_t, exp(log_small)).

    exp(log_large) is beta, the variance of the noise that the forward step from s to t adds.
    log_clipped equals log_small, except in the last step of a sampler (`ladder`).
    """

    of_x0: Tensor
    of_xt: Tensor
    log_small: Tensor
    log_clipped: Tensor
    log_large: Tensor


def step(t: Float[Tensor, "*b"], s: Float[Tensor, "*b"]) -> Step:
    """The step from logsnr t, maybe -inf, to s > t; at s = +inf its log_small is -inf."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    beta = -(logsigmoid(t) - logsigmoid(s)).expm1()  # 1 - (alpha_t / alpha_s)^2
    small = beta.log() + logsigmoid(-s) - logsigmoid(-t)
    of_xt = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    return Step(alpha_s * beta / sigma_t**2, of_xt, small, small, beta.log())


def ladder(
    schedule: Schedule, steps: int, device: torch.device | str = "cpu"
) -> tuple[Float64[Tensor, " steps"], Step]:
    """The levels of a process of at least two steps, cleanest first, and the step from each.

    The first step leads to clean data, so its log_small is -inf; as in iDDPM, its log_clipped is
    that of the second.
    """
    levels = table(schedule, steps, device)
    down = step(levels, torch.cat([levels.new_tensor([math.inf]), levels[:-1]]))
    clipped = torch.cat([down.log_small[1:2], down.log_small[1:]])
    return levels, down._replace(log_clipped=clipped)


def log_variance(denoised: Denoised, step: Step) -> Float[Tensor, "..."]:
    """The log variance of p(x_s | x_t).

    If only the mean of x0 is known, it is that of q. A learned range interpolates between that and
    beta (iDDPM, equation 15). A variance of x0 adds (dx_s / dx0)^2 var (Analytic-DPM, 2201.06503,
    theorem 1).
    """
    if denoised.range is not None:
        return denoised.range * step.log_large + (1 - denoised.range) * step.log_clipped
    if denoised.var is not None:
        return (step.of_x0**2 * denoised.var + step.log_small.exp()).log()
    return step.log_clipped
