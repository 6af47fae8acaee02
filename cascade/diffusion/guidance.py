"""Guidance and thresholds: from denoisers to denoisers, all in x0 space; they touch x0 only.

x0_hat is affine in eps, so extrapolating it is classifier-free guidance on eps. Scale 1 is no
guidance, 0 is unconditional (Ho and Salimans' w is scale - 1).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Denoiser, per_sample

# (conditional, unconditional): one doubled batch, or two networks.
Pair = Callable[[Float[Tensor, "b *d"], Float[Tensor, ""]], tuple[Denoised, Denoised]]


def extrapolate(pair: Pair, scale: float) -> Denoiser:
    """Classifier-free guidance (2207.12598); with a weaker network as the second, autoguidance."""

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        cond, null = pair(x, logsnr)
        return cond._replace(x0=null.x0 + scale * (cond.x0 - null.x0))

    return denoise


def rescale(pair: Pair, scale: float, phi: float = 0.7) -> Denoiser:
    """`extrapolate`, its contrast brought back to the conditional x0's (2305.08891, section 3.4).

    Args:
        phi: 0 leaves the guided x0, 1 gives it the standard deviation of the conditional one.
    """

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        cond, null = pair(x, logsnr)
        x0 = null.x0 + scale * (cond.x0 - null.x0)
        ratio = per_sample(cond.x0.flatten(1).std(1) / x0.flatten(1).std(1), x0)
        return cond._replace(x0=(phi * ratio + 1 - phi) * x0)

    return denoise


def interval(inside: Denoiser, outside: Denoiser, low: float, high: float) -> Denoiser:
    """One denoiser at EDM noise levels in (low, high], another elsewhere (2404.07724).

    Guided inside, unguided outside, where it costs one branch.
    """

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        within = low < (-logsnr / 2).exp() <= high
        return (inside if within else outside)(x, logsnr)

    return denoise


def static_threshold(inner: Denoiser, limit: float = 1.0) -> Denoiser:
    """Clips x0 to [-limit, limit]."""

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        denoised = inner(x, logsnr)
        return denoised._replace(x0=denoised.x0.clamp(-limit, limit))

    return denoise


def dynamic_threshold(
    inner: Denoiser, percentile: float = 0.995, cap: float | None = None
) -> Denoiser:
    """Clips x0 to [-g, g] and divides by g, the percentile of |x0| in each sample (Imagen, 2.3).

    Args:
        cap: g is at least 1 and at most this (DeepFloyd IF; 1 is the static threshold).
    """

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        denoised = inner(x, logsnr)
        x0 = denoised.x0
        # One sample at a time: older versions of torch.quantile refuse more than 2^24 numbers.
        g = torch.stack([sample.abs().flatten().quantile(percentile) for sample in x0])
        g = per_sample(g.clamp(1, cap), x0)
        return denoised._replace(x0=x0.clamp(-g, g) / g)

    return denoise
