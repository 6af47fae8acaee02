"""Prediction types, as three coefficients: x0_hat = c_skip x_t + c_out F(c_in x_t, logsnr).

On unit-variance data, EDM's preconditioning equals `v` up to the sign of F.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.noise import alpha_sigma


class Coeffs(NamedTuple):
    """Coefficients, each of the shape of logsnr."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


def eps(logsnr: Float[Tensor, "*b"]) -> Coeffs:
    """F is the noise (DDPM). At logsnr = -inf it does not determine x0, and c_skip is infinite."""
    alpha, sigma = alpha_sigma(logsnr)
    return Coeffs(torch.ones_like(alpha), 1 / alpha, -sigma / alpha)


def x0(logsnr: Float[Tensor, "*b"]) -> Coeffs:
    """F is the data (unCLIP's prior, section 2.2)."""
    one = torch.ones_like(logsnr)
    return Coeffs(one, torch.zeros_like(one), one)


def v(logsnr: Float[Tensor, "*b"]) -> Coeffs:
    """F is alpha eps - sigma x0 (progressive distillation, 2202.00512, appendix D)."""
    alpha, sigma = alpha_sigma(logsnr)
    return Coeffs(torch.ones_like(alpha), alpha, -sigma)


def flow(logsnr: Float[Tensor, "*b"]) -> Coeffs:
    """F is eps - x0, and its input x_t / (alpha + sigma), the straight path of rectified flow."""
    alpha, sigma = alpha_sigma(logsnr)
    scale = 1 / (alpha + sigma)
    return Coeffs(scale, scale, -sigma * scale)
