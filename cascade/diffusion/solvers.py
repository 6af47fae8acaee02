"""Solvers: from noise to data with a denoiser, (denoise, x, logsnrs, noise) -> x.

x is at level logsnrs[0], the noisiest, and is carried to logsnrs[-1], which may be +inf: clean,
where no noise is added and the result is the last x0_hat. All but Heun may start at -inf.
Coefficients are 0-d tensors on the CPU, in the precision of logsnrs (float64 from the sampler).
"""

import math
from itertools import pairwise
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.gaussian import Denoiser
from cascade.diffusion.noise import Noise, alpha_sigma
from cascade.diffusion.posterior import log_variance, step


def ancestral(
    denoise: Denoiser, x: Float[Tensor, "b *d"], logsnrs: Float[Tensor, " n"], noise: Noise
) -> Float[Tensor, "b *d"]:
    """DDPM's sampler: draws from q(x_s | x_t, x0_hat) (DDPM, equations 6 and 7).

    The variance is that of q, or what `log_variance` makes of what the denoiser knows: iDDPM's
    learned range, or Analytic-DPM's variance of x0. It is that of the step that is taken here,
    whatever steps were trained.
    """
    for t, s in pairwise(logsnrs):
        down, denoised = step(t, s), denoise(x, t)
        x = down.of_x0 * denoised.x0 + down.of_xt * x
        if not s.isposinf():
            x = x + (log_variance(denoised, down) / 2).exp() * noise(tuple(x.shape)).to(x)
    return x


def ddim(
    denoise: Denoiser,
    x: Float[Tensor, "b *d"],
    logsnrs: Float[Tensor, " n"],
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "b *d"]:
    """DDIM (2010.02502, equations 12 and 16): first order.

    Args:
        eta: 0 is deterministic and needs no noise; 1 is `ancestral`.
    """
    for t, s in pairwise(logsnrs):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        x0 = denoise(x, t).x0
        eps = (x - alpha_t * x0) / sigma_t
        if eta == 0 or s.isposinf():
            x = alpha_s * x0 + sigma_s * eps
        else:
            std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
            kept = (sigma_s**2 - std**2).clamp(min=0).sqrt()  # may round below 0 at alpha_t = 0
            x = alpha_s * x0 + kept * eps + std * noise(tuple(x.shape)).to(x)
    return x


def ddim_inversion(
    denoise: Denoiser, x: Float[Tensor, "b *d"], logsnrs: Float[Tensor, " n"]
) -> Float[Tensor, "b *d"]:
    """The way back: the x at logsnrs[0] from which `ddim` leads to x at logsnrs[-1].

    Each step takes eps at its cleaner end, so it is the inverse up to first order.

    Raises:
        ValueError: logsnrs[-1] is infinite: eps cannot be told from a clean x.
    """
    if logsnrs[-1].isposinf():
        raise ValueError("inversion starts from a finite logsnr, such as that of u = 0")
    return ddim(denoise, x, logsnrs.flip(0))


def heun(
    denoise: Denoiser,
    x: Float[Tensor, "b *d"],
    logsnrs: Float[Tensor, " n"],
    noise: Noise | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: Annotated[float, "inf"] = math.inf,
    s_noise: float = 1.0,
) -> Float[Tensor, "b *d"]:
    """EDM's sampler (2206.00364, algorithms 1 and 2): second order, two calls a step.

    Integrates y = x / alpha over tau = sigma / alpha, dy / dtau = (y - x0_hat) / tau. A change of
    x0_hat over a step is multiplied by half of tau_t / tau_s: space the levels by `karras`, not by
    a schedule that plunges to logsnr -20.

    Args:
        s_churn: over all steps, by how much tau is raised with fresh noise before a step; 0 is
            deterministic and needs no noise.
        s_min, s_max: the tau at which this is done; s_max may be infinite.
        s_noise: factor of the fresh noise.

    Raises:
        ValueError: logsnrs[0] is infinite.
    """
    if logsnrs[0].isneginf():
        raise ValueError("Heun starts from a finite logsnr")
    gamma = min(s_churn / (len(logsnrs) - 1), 2**0.5 - 1)
    y = x / alpha_sigma(logsnrs[0])[0]
    for t, s in pairwise(logsnrs):
        tau_t, tau_s = (-t / 2).exp(), (-s / 2).exp()
        if gamma and s_min <= tau_t <= s_max:
            spread = s_noise * tau_t * ((1 + gamma) ** 2 - 1) ** 0.5
            y = y + spread * noise(tuple(y.shape)).to(y)
            t, tau_t = t - 2 * math.log1p(gamma), tau_t * (1 + gamma)
        (alpha_t, _), (alpha_s, _) = alpha_sigma(t), alpha_sigma(s)
        x0 = denoise(alpha_t * y, t).x0
        slope, y_t = (y - x0) / tau_t, y
        y = x0 + tau_s / tau_t * (y - x0)
        if not s.isposinf():
            slope_s = (y - denoise(alpha_s * y, s).x0) / tau_s
            y = y_t + (tau_s - tau_t) * (slope + slope_s) / 2
    return alpha_sigma(logsnrs[-1])[0] * y


def dpmpp_2m(
    denoise: Denoiser,
    x: Float[Tensor, "b *d"],
    logsnrs: Float[Tensor, " n"],
    noise: Noise | None = None,
) -> Float[Tensor, "b *d"]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order, one call a step.

    The first step, and one from or to an infinite logsnr, is of first order.
    """
    previous = None  # x0_hat of the step before, and that step's h
    for t, s in pairwise(logsnrs):
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        h = (s - t) / 2
        x0 = denoise(x, t).x0
        guess = x0
        if previous is not None and h.isfinite():
            x0_before, h_before = previous
            guess = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = sigma_s / sigma_t * x - alpha_s * (-h).expm1() * guess
        previous = x0, h
    return x
