"""BSR: a small picture as optics, rescaling, sensors and compression leave it, for training.

The random chain of BSRGAN (Zhang et al., 2103.14006) at scale factor 4, in the milder variant of
latent diffusion (its `bsrgan_light`), and by configuration in the original one. Left out is the
sensor's noise that takes a network to simulate. Pictures are [3, h, w] in [0, 1] within the chain;
borders are mirrored; no step moves the picture.
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
from scipy.fft import next_fast_len
from torch import Tensor

FACTOR = 4

Picture = Float[Tensor, "3 _ _"]


def gaussian_kernel(
    size: int, l1: float, l2: float, theta: float = 0.0, centre: float = 0.0
) -> Float64[np.ndarray, "{size} {size}"]:
    """A Gaussian at whole pixels around the middle one, normalised.

    Args:
        size: odd.
        l1, l2: variances along the axis at `theta` to the x axis and across it, square pixels.
        centre: of the Gaussian, in pixels right of and below the middle.
    """
    offset = np.arange(size) - size // 2 - centre
    x, y = offset[None, :], offset[:, None]
    along = x * math.cos(theta) + y * math.sin(theta)
    across = y * math.cos(theta) - x * math.sin(theta)
    exponent = (along**2 / l1 + across**2 / l2) / 2
    kernel = np.exp(exponent.min() - exponent)  # 1 at the most, so that the sum is never 0
    return kernel / kernel.sum()


def filtered(
    x: Float[Tensor, "c h w"], kernel: Float64[np.ndarray, "k k"]
) -> Float[Tensor, "c h w"]:
    """x correlated with a kernel of odd side; borders are mirrored, as often as needed.

    By Fourier transform, at a size that it is fast at: for 25 x 25 taps on 256 px a tenth of the
    time of a convolution.
    """
    (h, w), reach = x.shape[1:], len(kernel) // 2
    padded = np.pad(x.numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    shape = tuple(next_fast_len(n) for n in padded.shape[1:])
    taps = torch.from_numpy(kernel).to(x.dtype)
    spectrum = torch.fft.rfft2(torch.from_numpy(padded), s=shape)
    spectrum *= torch.fft.rfft2(taps, s=shape).conj()
    return torch.fft.irfft2(spectrum, s=shape)[:, :h, :w]


def area(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c H W"]:
    """Resized to the mean over the area of each new pixel, parts of old pixels included."""
    rows, columns = (_overlap(n, m, x.dtype) for n, m in zip(x.shape[2:], size))
    return rows @ x @ columns.T


def _overlap(n: int, m: int, dtype: torch.dtype) -> Float[Tensor, "{m} {n}"]:
    edges = torch.arange(m + 1, dtype=torch.float64) * (n / m)
    old = torch.arange(n)
    shared = torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)
    return (shared.clamp(min=0) * (m / n)).to(dtype)


# OpenCV's, with which the published chain resizes: the first two alias when they shrink.
RESIZES: Sequence[Callable[..., Tensor]] = (
    partial(F.interpolate, mode="bilinear"),
    partial(F.interpolate, mode="bicubic"),
    area,
)


def resized(
    x: Float[Tensor, "c h w"], size: tuple[int, int], rng: np.random.Generator
) -> Float[Tensor, "c H W"]:
    """Resized in one of three ways."""
    return RESIZES[rng.integers(len(RESIZES))](x[None], size)[0].clamp(0, 1)


def halved(x: Float[Tensor, "c h w"], rng: np.random.Generator) -> Float[Tensor, "c H W"]:
    """At half the size, in one of the three ways or, as often as in all of these, anti-aliased."""
    size = x.shape[1] // 2, x.shape[2] // 2
    if rng.random() < 0.5:
        return resized(x, size, rng)
    return F.interpolate(x[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def jpeg(x: Float[Tensor, "3 h w"], quality: int) -> Float[Tensor, "3 h w"]:
    """Through a JPEG file, with its colours at half the resolution, and back."""
    pixels = x.mul(255).round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    back = np.array(Image.open(file, formats=["JPEG"]))
    return torch.from_numpy(back).permute(2, 0, 1).contiguous() / 255


class Goal(NamedTuple):
    """Where the shuffled steps lead: `factor` times smaller, to the size (h, w)."""

    factor: int
    size: tuple[int, int]


@dataclass(frozen=True)
class BSR:
    """From a picture to a degraded one at a quarter of its size.

    A quarter of the pictures is halved first. Then come, in random order, blurs, two resizings
    (the first one random, the second to the final size), Gaussian noise and JPEG; a last JPEG
    follows. The defaults are latent diffusion's `bsrgan_light`, which unCLIP's second upsampler
    is taken to use (appendix C).

    Args:
        blurs: how many.
        width: of the blurs: factor of the variances of BSRGAN's elliptic kernels, which reach
            4 + factor, and of the deviations of its round ones, which reach 2 + factor / 5.
        elliptic_sizes, round_sizes: sides of the kernels, of which one is drawn. An even one is
            taken one larger, as even kernels move the picture by half a pixel.
        resized_share: how often the first resizing is to a random size; else the picture is
            smoothed by a Gaussian and decimated.
        noise_levels: least and greatest deviation of the noise, in 1/255.
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
        """From [3, h, w] to [3, h // 4, w // 4], both in [-1, 1]; all draws are from `rng`."""
        size = x.shape[1] // FACTOR, x.shape[2] // FACTOR
        x, factor = (x[:, : FACTOR * size[0], : FACTOR * size[1]] + 1) / 2, FACTOR
        if rng.random() < 0.25:
            x, factor = halved(x, rng), FACTOR // 2
        for step in self.steps(rng):
            x = step(x, Goal(factor, size), rng)
        return self.compress(x, rng) * 2 - 1

    def steps(self, rng: np.random.Generator) -> list[Callable[..., Tensor]]:
        """The steps in random order, but for the two resizings, whose own order is kept."""
        steps = [self.blur] * self.blurs
        steps += [self.shrink, self.finish, self.add_noise, self.compress_or_not]
        steps = [steps[i] for i in rng.permutation(len(steps))]
        first, last = sorted((steps.index(self.shrink), steps.index(self.finish)))
        steps[first], steps[last] = self.shrink, self.finish
        return steps

    def blur(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """By a round or by an elliptic Gaussian, equally often."""
        if rng.random() < 0.5:
            size = int(rng.choice(self.elliptic_sizes)) | 1
            l1, l2 = self.width * (4 + goal.factor) * (1 - rng.random(2))
            return filtered(x, gaussian_kernel(size, l1, l2, rng.uniform(0, math.pi)))
        size = int(rng.choice(self.round_sizes)) | 1
        variance = (self.width * (2 + goal.factor / 5) * (1 - rng.random())) ** 2
        return filtered(x, gaussian_kernel(size, variance, variance))

    def shrink(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """To anything from the same size to half of the final one, or by decimation."""
        if rng.random() < self.resized_share:
            ratio = rng.uniform(1, 2 * goal.factor)
            size = tuple(max(1, int(n / ratio)) for n in x.shape[1:])
            return resized(x, size, rng)
        variance = rng.uniform(0.1, 0.6 * goal.factor) ** 2
        # A new pixel lies amid the old ones that it stands for, not upon the first of them.
        kernel = gaussian_kernel(25, variance, variance, centre=(goal.factor - 1) / 2)
        return filtered(x, kernel)[:, :: goal.factor, :: goal.factor].clamp(0, 1)

    def finish(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """To the final size."""
        return resized(x, goal.size, rng)

    def add_noise(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """Gaussian: grey, of each colour, or correlated (this always at the greatest level)."""
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
        """As a JPEG file."""
        least, most = self.qualities
        return jpeg(x, int(rng.integers(least, most + 1)))

    def compress_or_not(self, x: Picture, goal: Goal, rng: np.random.Generator) -> Picture:
        """As a JPEG file, nine times out of ten."""
        return self.compress(x, rng) if rng.random() < 0.9 else x


def _correlating(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """A root of a random covariance of the colours: |U' D U|, with random axes and variances."""
    axes = np.linalg.svd(rng.random((3, 3)))[0]
    values, vectors = np.linalg.eigh(np.abs(axes.T * rng.random(3) @ axes))
    return (vectors * np.sqrt(values.clip(0))).astype(np.float32)
