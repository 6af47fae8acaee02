"""Noise levels, in one coordinate: logsnr of the variance-preserving process.

x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, and logsnr = log(alpha^2 / sigma^2), which
may be infinite. EDM's sigma is sigma / alpha = exp(-logsnr / 2). A schedule maps u in [0, 1] (0
clean, 1 noise) to logsnr; u is uniform in training, so the schedule also sets the density of noise
levels. A published table of T steps is a schedule, too: its index i is u = (i + 1) / T.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Draws standard normal numbers of a shape [b, ...], from one stream for each of the b samples.
Noise = Callable[[tuple[int, ...]], Tensor]
Schedule = Callable[[Float[Tensor, "*n"]], Float[Tensor, "*n"]]

LIMIT = 20.0  # networks read logsnr clamped to +-20, where alpha or sigma is 5e-5


def uniform(noise: Noise, shape: tuple[int, ...]) -> Float64[Tensor, "*d"]:
    """Draws uniform numbers in (0, 1).

    It maps normal draws by their CDF, so that one source gives all draws. In float64 none rounds to
    0 or 1.
    """
    return torch.special.ndtr(noise(shape).double())


def alpha_sigma(logsnr: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """(alpha, sigma): sqrt(sigmoid(+-logsnr)), exact at both infinities."""
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def cosine(u: Float[Tensor, "*n"], *, s: float = 0.008) -> Float[Tensor, "*n"]:
    """iDDPM's schedule in continuous time: alpha = cos(pi/2 (u + s) / (1 + s)), their equation 17.

    From 8.8 at u = 0 (the offset s leaves a little noise) to exactly -inf at u = 1.
    """
    quarter = math.pi / 2 / (1 + s)
    alpha = ((1 - u) * quarter).sin()  # as a sine, which is exactly 0 at u = 1
    return 2 * (alpha / ((u + s) * quarter).sin()).log()


def cosine_table(u: Float[Tensor, "*n"], *, steps: int = 1000) -> Float[Tensor, "*n"]:
    """iDDPM's discrete cosine schedule: beta_i = min(1 - f((i + 1) / steps) / f(i / steps), .999).

    As in all tables here, u in (i / steps, (i + 1) / steps] is the level of index i.
    """
    return _look_up(_cosine_table(steps), u)


def linear_table(u: Float[Tensor, "*n"], *, steps: int = 1000) -> Float[Tensor, "*n"]:
    """DDPM's discrete schedule: betas from 1e-4 to 0.02, times 1000 / steps (iDDPM's scaling)."""
    return _look_up(_linear_table(steps), u)


def scaled_linear_table(u: Float[Tensor, "*n"], *, steps: int = 1000) -> Float[Tensor, "*n"]:
    """Stable Diffusion's schedule: roots of betas, evenly spaced from 0.00085 to 0.012.

    Betas are scaled by 1000 / steps. The noisiest level retains an SNR of 0.0047 (2305.08891, table
    1).
    """
    return _look_up(_scaled_linear_table(steps), u)


def zero_terminal_snr(
    u: Float[Tensor, "*n"], *, schedule: Schedule = scaled_linear_table, steps: int = 1000
) -> Float[Tensor, "*n"]:
    """A table whose alphas are shifted and scaled so that it ends at exactly -inf.

    2305.08891, algorithm 1: the first level does not change.
    """
    return _look_up(_zero_terminal_table(schedule, steps), u)


def cosine_logsnr(
    u: Float[Tensor, "*n"], *, size: int = 64, low: float = -15.0, high: float = 15.0
) -> Float[Tensor, "*n"]:
    """Simple diffusion's shifted cosine: -2 log tan(angle) + 2 log(64 / size) (2301.11093).

    Args:
        u: the angle is linear in it, from logsnr `high` at 0 to `low` at 1, before the shift.
        size: side of the pictures, in pixels; larger ones need more noise to lose the same detail.
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


def table(
    schedule: Schedule, steps: int, device: torch.device | str = "cpu"
) -> Float64[Tensor, " {steps}"]:
    """Tabulates any schedule: the levels of indices 0 to steps - 1, clamped to +-`LIMIT`."""
    u = torch.arange(1, steps + 1, dtype=torch.float64, device=device) / steps
    return schedule(u).clamp(-LIMIT, LIMIT)


def table_index(logsnr: Float[Tensor, "*n"], levels: Float[Tensor, " t"]) -> Float[Tensor, "*n"]:
    """The index of logsnr in a `table`, from 0 to t - 1, which published networks read.

    Exact on the table, if both have the same dtype; linear in between.
    """
    right = torch.searchsorted(-levels, -logsnr).clamp(1, len(levels) - 1)
    left = right - 1
    share = (levels[left] - logsnr) / (levels[left] - levels[right])
    return left + share.clamp(0, 1)


# The device is named so that a table built under torch.device("meta") still holds numbers.
@cache
def _cosine_table(steps: int) -> Float64[Tensor, " n"]:
    u = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    f = alpha_sigma(cosine(u))[0] ** 2
    return _from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999))


@cache
def _linear_table(steps: int) -> Float64[Tensor, " n"]:
    beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device="cpu")
    return _from_betas(beta * (1000 / steps))


@cache
def _scaled_linear_table(steps: int) -> Float64[Tensor, " n"]:
    ends = 0.00085**0.5, 0.012**0.5
    root = torch.linspace(*ends, steps, dtype=torch.float64, device="cpu")
    return _from_betas(root**2 * (1000 / steps))


@cache
def _zero_terminal_table(schedule: Schedule, steps: int) -> Float64[Tensor, " n"]:
    u = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
    alpha, _ = alpha_sigma(schedule(u))
    return torch.logit(((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2)


def _from_betas(beta: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    return torch.logit((1 - beta).cumprod(0))


def _look_up(table: Float64[Tensor, " n"], u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    # The 1e-4 keeps multiples of 1 / steps, which float32 may round up, at their own index.
    index = (u.double() * len(table) - 1e-4).ceil().long() - 1
    return table.to(u.device)[index.clamp(min=0)].to(u.dtype)
