"""Solvers: functions (denoise, x, logsnrs, noise) -> x that carry noise to data.

x is at level logsnrs[0], the noisiest, and is carried to logsnrs[-1]. That may be +inf, clean data:
the last step then adds no noise and returns x0_hat. All but Heun may start at -inf. Coefficients
are 0-d tensors on the CPU, in the precision of logsnrs (float64 from the sampler).
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

    The variance is that of q, or follows from the denoiser's learned range (iDDPM) or variance of
    x0 (Analytic-DPM), by `log_variance`. It belongs to the step taken here, whatever the steps of
    training.
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

    Raises:
        ValueError: eta is above 0, and there is no noise.
    """
    for t, s in pairwise(logsnrs):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        x0 = denoise(x, t).x0
        eps = (x - alpha_t * x0) / sigma_t
        if eta == 0 or s.isposinf():
            x = alpha_s * x0 + sigma_s * eps
        elif noise is None:
            raise ValueError("DDIM with eta above 0 needs noise")
        else:
            std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
            kept = (sigma_s**2 - std**2).clamp(min=0).sqrt()  # at alpha_t = 0 it may round below 0
            x = alpha_s * x0 + kept * eps + std * noise(tuple(x.shape)).to(x)
    return x


def ddim_inversion(
    denoise: Denoiser,
    x: Float[Tensor, "b *d"],
    logsnrs: Float[Tensor, " n"],
    refine: int = 0,
) -> Float[Tensor, "b *d"]:
    """Inverts `ddim`: the x at logsnrs[0] from which it leads to the given x at logsnrs[-1].

    Each step evaluates eps where the sample is, at the step's cleaner end, so the inversion is
    exact to first order.

    Args:
        refine: iterations per step, each of which evaluates eps at the noisier end that was found
            so far. Their fixed point inverts the step exactly. An iteration multiplies the error by
            at most 1 minus the ratio of the ends' sigma / alpha, if data has at most unit variance,
            so space the levels evenly in logsnr, or nearly so (`karras`).

    Raises:
        ValueError: logsnrs[-1] is infinite, where a clean x does not determine eps.
    """
    if logsnrs[-1].isposinf():
        raise ValueError("inversion starts from a finite logsnr, such as that of u = 0")
    for s, t in pairwise(logsnrs.flip(0)):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(s), alpha_sigma(t)
        x_s, x0 = x, denoise(x, s).x0
        x = alpha_t * x0 + sigma_t * ((x_s - alpha_s * x0) / sigma_s)
        for _ in range(refine):
            eps = (x - alpha_t * denoise(x, t).x0) / sigma_t
            x = alpha_t / alpha_s * (x_s - sigma_s * eps) + sigma_t * eps
    return x


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
    """EDM's sampler (2206.00364, algorithms 1 and 2): second order, two calls per step.

    Integrates dy / dtau = (y - x0_hat) / tau for y = x / alpha and tau = sigma / alpha. A step
    multiplies the change of x0_hat by half of tau_t / tau_s, so space the levels by `karras`, and
    not by a schedule that drops to logsnr -20.

    Args:
        s_churn: total churn over all steps, which raises tau with fresh noise before each step; 0
            is deterministic and needs no noise.
        s_min, s_max: range of tau with churn; s_max may be infinite.
        s_noise: factor of the fresh noise.

    Raises:
        ValueError: logsnrs[0] is infinite, or there is churn and no noise.
    """
    if logsnrs[0].isneginf():
        raise ValueError("Heun starts from a finite logsnr")
    gamma = min(s_churn / (len(logsnrs) - 1), 2**0.5 - 1)
    y = x / alpha_sigma(logsnrs[0])[0]
    for t, s in pairwise(logsnrs):
        tau_t, tau_s = (-t / 2).exp(), (-s / 2).exp()
        if gamma and s_min <= tau_t <= s_max:
            if noise is None:
                raise ValueError("Heun with churn needs noise")
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
    share: float = 1.0,
) -> Float[Tensor, "b *d"]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order, one call per step.

    The first step, and any step from or to an infinite logsnr, is first order.

    Args:
        share: of the second-order correction; 0 is `ddim`.
    """
    previous = None  # the previous step's x0_hat and h
    for t, s in pairwise(logsnrs):
        (_, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        h = (s - t) / 2
        x0 = denoise(x, t).x0
        guess = x0
        if previous is not None and h.isfinite():
            x0_before, h_before = previous
            guess = x0 + share * h / (2 * h_before) * (x0 - x0_before)
        x = sigma_s / sigma_t * x - alpha_s * (-h).expm1() * guess
        previous = x0, h
    return x
