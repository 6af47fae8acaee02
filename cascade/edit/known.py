"""Solvers around solvers, for pictures of which something is known."""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cascade.diffusion.gaussian import Denoiser
from cascade.diffusion.noise import Noise, alpha_sigma
from cascade.diffusion.sampling import Solver


def renoised(
    x: Float[Tensor, "b *d"], s: Float[Tensor, ""], t: Float[Tensor, ""], noise: Noise
) -> Float[Tensor, "b *d"]:
    """Draws from q(x_t | x_s), for a level t at most as clean as s; s may be +inf."""
    kept = alpha_sigma(t)[0] / alpha_sigma(s)[0]
    return kept * x + (1 - kept**2).clamp(min=0).sqrt() * noise(tuple(x.shape)).to(x)


def from_picture(inner: Solver, x0: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Solver:
    """Starts at x0, noised to a level, and passes the levels that are cleaner (SDEdit, 2108.01073).

    Args:
        inner: carries the sample from there.
    """

    def solve(
        denoise: Denoiser, x: Float[Tensor, "b *d"], logsnrs: Float[Tensor, " n"], noise: Noise
    ) -> Float[Tensor, "b *d"]:
        alpha, sigma = alpha_sigma(logsnr)
        eps = x / alpha_sigma(logsnrs[0])[1]
        left = torch.cat([logsnr[None].to(logsnrs), logsnrs[logsnrs > logsnr]])
        return inner(denoise, alpha * x0 + sigma * eps, left, noise)

    return solve


def repaint(
    inner: Solver,
    x0: Float[Tensor, "b *d"],
    unknown: Bool[Tensor, "*e"],
    jumps: int = 1,
) -> Solver:
    """Samples the unknown part of x0 given the known part (RePaint, 2201.09865, algorithm 1).

    At each level the known part is noised afresh to that level, so that network and known part
    agree about the noise. Going back and repeating a step (`jumps`) lets the two parts adapt to
    each other. The distribution approaches that of the unknown part given the known one as jumps
    and steps increase; the error of its mean falls as 1 / jumps.

    Args:
        inner: carries the sample from each level to the next.
        x0: clean; values where it is unknown do not matter.
        unknown: what to paint; broadcasts against x0.
        jumps: times that each step is taken.
    """

    def solve(
        denoise: Denoiser, x: Float[Tensor, "b *d"], logsnrs: Float[Tensor, " n"], noise: Noise
    ) -> Float[Tensor, "b *d"]:
        def kept(x: Tensor, logsnr: Tensor) -> Tensor:
            known = x0
            if not logsnr.isposinf():
                alpha, sigma = alpha_sigma(logsnr)
                known = alpha * x0 + sigma * noise(tuple(x0.shape)).to(x0)
            return torch.where(unknown, x, known)

        x = kept(x, logsnrs[0])
        for t, s in pairwise(logsnrs):
            for again in range(jumps):
                if again:
                    x = kept(renoised(x, s, t, noise), t)
                x = kept(inner(denoise, x, torch.stack([t, s]), noise), s)
        return x

    return solve
