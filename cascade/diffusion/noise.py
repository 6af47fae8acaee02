"""Noise levels: one coordinate, logsnr, of the variance-preserving process.

x_t = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1, logsnr = log(alpha^2 / sigma^2), which may be
infinite. A schedule maps u in [0, 1] (0 clean, 1 noise) to logsnr; with u uniform it is also the
density of noise levels in training. EDM's sigma is sigma / alpha = exp(-logsnr / 2).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Standard normal draws of a shape [b, ...], one stream for each of the b samples.
Noise = Callable[[tuple[int, ...]], Tensor]
Schedule = Callable[[Float[Tensor, "*n"]], Float[Tensor, "*n"]]


def alpha_sigma(logsnr: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """(alpha, sigma): sqrt(sigmoid(+-logsnr)), exact at both infinities."""
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def cosine(u: Float[Tensor, "*n"], *, s: float = 0.008) -> Float[Tensor, "*n"]:
    """iDDPM's schedule in continuous time: alpha = cos(pi/2 (u + s) / (1 + s)), their equation 17.

    From 8.8 at u = 0 (their offset s keeps a little noise) to exactly -inf at u = 1.
    """
    quarter = math.pi / 2 / (1 + s)
    alpha = ((1 - u) * quarter).sin()  # the cosine of the complement, which is exactly 0 at u = 1
    return 2 * (alpha / ((u + s) * quarter).sin()).log()


def cosine_table(u: Float[Tensor, "*n"], *, steps: int = 1000) -> Float[Tensor, "*n"]:
    """iDDPM's discrete cosine schedule: beta_i = min(1 - f((i + 1) / steps) / f(i / steps), .999).

    u in (i / steps, (i + 1) / steps] is the level of index i; so is it in `linear_table`.
    """
    return _look_up(_cosine_table(steps), u)


def linear_table(u: Float[Tensor, "*n"], *, steps: int = 1000) -> Float[Tensor, "*n"]:
    """DDPM's discrete schedule: betas from 1e-4 to 0.02, times 1000 / steps (iDDPM's scaling)."""
    return _look_up(_linear_table(steps), u)


def cosine_logsnr(
    u: Float[Tensor, "*n"], *, size: int = 64, low: float = -15.0, high: float = 15.0
) -> Float[Tensor, "*n"]:
    """Simple diffusion's shifted cosine: -2 log tan(angle) + 2 log(64 / size) (2301.11093).

    Args:
        u: the angle goes evenly from logsnr `high` at 0 to `low` at 1, before the shift.
        size: side of the pictures in pixels; larger ones need more noise to lose as much.
    """
    first, last = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    return -2 * (first + u * (last - first)).tan().log() + 2 * math.log(64 / size)


def lognormal(
    u: Float[Tensor, "*n"], *, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5
) -> Float[Tensor, "*n"]:
    """EDM's density, log(sigma) ~ N(mean, std^2), for data scaled to unit variance (their table 1).

    From +inf at u = 0 to -inf at u = 1.
    """
    return -2 * (mean + std * torch.special.ndtri(u) - math.log(sigma_data))


def karras(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float64[Tensor, " n"]:
    """EDM's levels for sampling, in sigma / alpha, as logsnrs (2206.00364, equation 5).

    Returns:
        [steps + 1], from sigma_max by way of sigma_min to clean (+inf).
    """
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64)
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (ends[0] + ramp * (ends[1] - ends[0])) ** rho
    return torch.cat([-2 * sigma.log(), sigma.new_tensor([math.inf])])


@cache
def _cosine_table(steps: int) -> Float64[Tensor, " n"]:
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = alpha_sigma(cosine(u))[0] ** 2
    return _table((1 - f[1:] / f[:-1]).clamp(max=0.999))


@cache
def _linear_table(steps: int) -> Float64[Tensor, " n"]:
    return _table(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps))


def _table(beta: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    return torch.logit((1 - beta).cumprod(0))


def _look_up(table: Float64[Tensor, " n"], u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    # The 1e-4 keeps a multiple of 1 / steps, which float32 may lift, at its own index.
    index = (u.double() * len(table) - 1e-4).ceil().long() - 1
    return table.to(u.device)[index.clamp(min=0)].to(u.dtype)
