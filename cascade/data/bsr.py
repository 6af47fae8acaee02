"""BSR: a small training picture degraded as by optics, rescaling, sensors and compression.

The random chain of BSRGAN (Zhang et al., 2103.14006) at scale factor 4: by default the milder
variant of latent diffusion (its `bsrgan_light`), by configuration the original. Omitted is the
sensor noise that takes a network to simulate. Within the chain pictures are [3, h, w] in [0, 1];
borders are mirrored; no step shifts the picture.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor

FACTOR = 4

Picture = Float[Tensor, "3 _ _"]


def gaussian_kernel(
    size: int, l1: float, l2: float, theta: float = 0.0, centre: float = 0.0
) -> Float64[np.ndarray, "{size} {size}"]:
    """Sample a Gaussian at integer pixels around the centre pixel, normalised to sum 1.

    Args:
        size: odd.
        l1, l2: variances along the axis at `theta` to the x axis and across it, in square pixels.
        centre: offset of the Gaussian to the right and downwards, in pixels.
    """
    offset = np.arange(size) - size // 2 - centre
    x, y = offset[None, :], offset[:, None]
    along = x * math.cos(theta) + y * math.sin(theta)
    across = y * math.cos(theta) - x * math.sin(theta)
    exponent = (along**2 / l1 + across**2 / l2) / 2
    kernel = np.exp(exponent.min() - exponent)  # its maximum is 1, so the sum is never 0
    return kernel / kernel.sum()


def filtered(
    x: Float[Tensor, "c h w"], kernel: Float64[np.ndarray, "k k"]
) -> Float[Tensor, "c h w"]:
    """Correlate x with a kernel of odd side; borders are mirrored, as often as needed.

    By FFT, at a fast size: 25 x 25 taps on 256 px take a tenth of the time of a convolution.
    """
    from scipy.fft import next_fast_len  # here, as sampling does not need it

    (h, w), reach = x.shape[1:], len(kernel) // 2
    padded = np.pad(x.numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    shape = tuple(next_fast_len(n) for n in padded.shape[1:])
    taps = torch.from_numpy(kernel).to(x.dtype)
    spectrum = torch.fft.rfft2(torch.from_numpy(padded), s=shape)
    spectrum *= torch.fft.rfft2(taps, s=shape).conj()
    return torch.fft.irfft2(spectrum, s=shape)[:, :h, :w]


def area(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c H W"]:
    """Resize to the mean over the area of each new pixel, which may cover parts of old pixels."""
    rows, columns = (_overlap(n, m, x.dtype) for n, m in zip(x.shape[2:], size))
    return rows @ x @ columns.T


def _overlap(n: int, m: int, dtype: torch.dtype) -> Float[Tensor, "{m} {n}"]:
    edges = torch.arange(m + 1, dtype=torch.float64) * (n / m)
    old = torch.arange(n)
    shared = torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)
    return (shared.clamp(min=0) * (m / n)).to(dtype)


# OpenCV's filters, which the published chain uses: the first two alias when they shrink.
RESIZES: Sequence[Callable[..., Tensor]] = (
    partial(F.interpolate, mode="bilinear"),
    partial(F.interpolate, mode="bicubic"),
    area,
)


def resized(
    x: Float[Tensor, "c h w"], size: tuple[int, int], rng: np.random.Generator
) -> Float[Tensor, "c H W"]:
    """Resize by a randomly chosen filter."""
    return RESIZES[rng.integers(len(RESIZES))](x[None], size)[0].clamp(0, 1)


def halved(x: Float[Tensor, "c h w"], rng: np.random.Generator) -> Float[Tensor, "c H W"]:
    """Halve the size: anti-aliased with probability 1/2, else by a randomly chosen filter."""
    size = x.shape[1] // 2, x.shape[2] // 2
    if rng.random() < 0.5:
        return resized(x, size, rng)
    return F.interpolate(x[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def jpeg(x: Float[Tensor, "3 h w"], quality: int) -> Float[Tensor, "3 h w"]:
    """Encode as JPEG, with chroma at half the resolution, and decode."""
    pixels = x.mul(255).round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    back = np.array(Image.open(file, formats=["JPEG"]))
    return torch.from_numpy(back).permute(2, 0, 1).contiguous() / 255


class Goal(NamedTuple):
    """The target of the shuffled steps: `factor` times smaller, the size (h, w)."""

    factor: int
    size: tuple[int, int]


@dataclass(frozen=True)
class BSR:
    """Degrades a picture and shrinks it to a quarter of its size.

    A quarter of the pictures is halved first. Then follow, in random order, blurs, two resizings
    (the first to a random size, the second to the final one), Gaussian noise and JPEG; a last JPEG
    ends the chain. The defaults are latent diffusion's `bsrgan_light`, presumably what unCLIP's
    second upsampler uses (appendix C).

    Args:
        blurs: how many.
        width: scales BSRGAN's blurs: the variances of its elliptic kernels, of up to 4 + factor,
            and the standard deviations of its round ones, of up to 2 + factor / 5.
        elliptic_sizes, round_sizes: sides of the kernels, one of which is drawn. An even side is
            increased by one, as even kernels shift the picture by half a pixel.
        resized_share: probability that the first resizing is to a random size; otherwise the
            picture is smoothed by a Gaussian and decimated.
        noise_levels: least and greatest standard deviation of the noise, in 1/255.
        qualities: least and greatest quality of the JPEG files.
    """

    blurs: int = 1
    width: float = 0.25
    elliptic_sizes: Sequence[int] = tuple(range(5, 15))
    round_sizes: Sequence[int] = (5, 6, 7)
    resized_share: float = 0.8
    noise_levels: Sequence[int] = (1, 2)
    qualities: Sequence[int] = (80, 95)

    def __call__(
        self, x: Float[Tensor, "3 h w"], rng: np.random.Generator
    ) -> Float[Tensor, "3 H W"]:
        """Degrade [3, h, w] to [3, h // 4, w // 4], both in [-1, 1], with all draws from `rng`."""
        size = x.shape[1] // FACTOR, x.shape[2] // FACTOR
        x, factor = (x[:, : FACTOR * size[0], : FACTOR * size[1]] + 1) / 2, FACTOR
        if rng.random() < 0.25:
            x, factor = halved(x, rng), FACTOR // 2
        for step in self.steps(rng):
            x = step(x, Goal(factor, size), rng)
        return self.compress(x, rng) * 2 - 1

    def steps(self, rng: np.random.Generator) -> list[Callable[..., Tensor]]:
        """Return the steps in random order, except that `shrink` precedes `finish`."""
        steps = [self.blur] * self.blurs
        steps += [self.shrink, self.finish, self.add_noise, self.compress_or_not]
        steps = [steps[i] for i in rng.permutation(len(steps))]
        first, last = sorted((steps.index(self.shrink), steps.index(self.finish)))
        steps[first], steps[last] = self.shrink, self.finish
        return steps

    def blur(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Blur by a round or an elliptic Gaussian, with equal probability."""
        if rng.random() < 0.5:
            size = int(rng.choice(self.elliptic_sizes)) | 1
            l1, l2 = self.width * (4 + goal.factor) * (1 - rng.random(2))
            return filtered(x, gaussian_kernel(size, l1, l2, rng.uniform(0, math.pi)))
        size = int(rng.choice(self.round_sizes)) | 1
        variance = (self.width * (2 + goal.factor / 5) * (1 - rng.random())) ** 2
        return filtered(x, gaussian_kernel(size, variance, variance))

    def shrink(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Resize to a random size, from the present one to half of the final one, or decimate."""
        if rng.random() < self.resized_share:
            ratio = rng.uniform(1, 2 * goal.factor)
            size = tuple(max(1, int(n / ratio)) for n in x.shape[1:])
            return resized(x, size, rng)
        variance = rng.uniform(0.1, 0.6 * goal.factor) ** 2
        # A new pixel lies at the centre of the old ones that it replaces, not on the first of them.
        kernel = gaussian_kernel(25, variance, variance, centre=(goal.factor - 1) / 2)
        return filtered(x, kernel)[:, :: goal.factor, :: goal.factor].clamp(0, 1)

    def finish(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Resize to the final size."""
        return resized(x, goal.size, rng)

    def add_noise(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Add Gaussian noise: grey, independent per channel, or correlated (at the top level)."""
        least, most = self.noise_levels
        level, kind = rng.integers(least, most + 1), rng.random()
        channels = 1 if kind < 0.4 else 3
        noise = rng.standard_normal((channels, *x.shape[1:]), dtype=np.float32)
        if kind < 0.8:
            noise *= level
        else:
            noise = np.tensordot(most * _correlating(rng), noise, 1)
        return (x + torch.from_numpy(noise) / 255).clamp(0, 1)

    def compress(self, x: Picture, rng: np.random.Generator) -> Picture:
        """Compress as JPEG."""
        least, most = self.qualities
        return jpeg(x, int(rng.integers(least, most + 1)))

    def compress_or_not(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Compress as JPEG with probability 0.9."""
        return self.compress(x, rng) if rng.random() < 0.9 else x


def _correlating(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """Draw a square root of a random colour covariance |U' D U|: random axes and variances."""
    axes = np.linalg.svd(rng.random((3, 3)))[0]
    values, vectors = np.linalg.eigh(np.abs(axes.T * rng.random(3) @ axes))
    return (vectors * np.sqrt(values.clip(0))).astype(np.float32)
