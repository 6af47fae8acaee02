"""Guidance and thresholding: functions from denoisers to denoisers, which change x0 alone.

x0_hat is affine in eps, so extrapolating x0_hat equals classifier-free guidance on eps. A scale of
1 is no guidance, 0 is unconditional (Ho and Salimans' w is scale - 1).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Denoiser, per_sample

# Returns (conditional, unconditional), from one doubled batch or from two networks.
Pair = Callable[[Float[Tensor, "b *d"], Float[Tensor, ""]], tuple[Denoised, Denoised]]


def extrapolate(pair: Pair, scale: float) -> Denoiser:
    """Classifier-free guidance (2207.12598); autoguidance (2406.02507) if the second is weaker."""

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        cond, null = pair(x, logsnr)
        return cond._replace(x0=null.x0 + scale * (cond.x0 - null.x0))

    return denoise


def rescale(pair: Pair, scale: float, phi: float = 0.7) -> Denoiser:
    """Guidance with the contrast of the conditional x0 restored (2305.08891, section 3.4).

    Args:
        phi: 0 leaves the guided x0, 1 gives it the conditional one's standard deviation.
    """

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        cond, null = pair(x, logsnr)
        x0 = null.x0 + scale * (cond.x0 - null.x0)
        ratio = per_sample(cond.x0.flatten(1).std(1) / x0.flatten(1).std(1), x0)
        return cond._replace(x0=(phi * ratio + 1 - phi) * x0)

    return denoise


def interval(inside: Denoiser, outside: Denoiser, low: float, high: float) -> Denoiser:
    """Uses one denoiser at noise levels sigma / alpha in (low, high], another elsewhere.

    With a guided one inside and an unguided one outside, it is guidance in a limited interval
    (2404.07724), and costs one branch outside.
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
    """Clips x0 to [-g, g] and divides by g (Imagen, section 2.3).

    Args:
        percentile: g is this quantile of |x0| in each sample, and at least 1.
        cap: the greatest g (DeepFloyd IF); 1 is the static threshold.
    """

    def denoise(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        denoised = inner(x, logsnr)
        x0 = denoised.x0
        # One sample at a time, because torch.quantile may refuse more than 2^24 numbers.
        g = torch.stack([sample.abs().flatten().quantile(percentile) for sample in x0])
        g = per_sample(g.clamp(1, cap), x0)
        return denoised._replace(x0=x0.clamp(-g, g) / g)

    return denoise
