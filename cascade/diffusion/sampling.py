"""Everything that is decided at inference, in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Denoiser, Net, Process
from cascade.diffusion.guidance import Pair, extrapolate, interval
from cascade.diffusion.noise import LIMIT, Noise, alpha_sigma, cosine
from cascade.diffusion.spacing import Spacing, even
from cascade.errors import UserError

Solver = Callable[[Denoiser, Tensor, Tensor, Noise], Tensor]


@runtime_checkable
class Joinable(Protocol):
    """A condition: two can be joined into one batch."""

    def cat(self, other: "Joinable") -> "Joinable": ...


# A network and its condition: the same network told nothing, or another one (autoguidance).
Weaker = tuple[Net, Joinable]


@dataclass(frozen=True)
class DiffusionSampler:
    """Draws x0 from a trained process.

    Args:
        steps: of the solver.
        solver: one of `solvers`.
        scale: of guidance; 1 is none, and costs one branch.
        guide: makes the guided denoiser of the two branches and the scale.
        interval: EDM noise levels (low, high] outside of which there is no guidance; high may be
            infinite.
        threshold: wraps the guided denoiser.
        spacing: (schedule, steps) -> logsnrs [steps + 1].
        init: factor of the first noise (GLIDE's upsampler: 0.997).

    Raises:
        UserError: no steps, or a number that `spacing` cannot give; an empty interval.
    """

    steps: int
    solver: Solver
    scale: float = 1.0
    guide: Callable[[Pair, float], Denoiser] = extrapolate
    interval: tuple[float, Annotated[float, "inf"]] | None = None
    threshold: Callable[[Denoiser], Denoiser] | None = None
    spacing: Spacing = even
    init: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"a sampler of {self.steps} steps: it needs at least 1")
        if self.interval and self.interval[0] >= self.interval[1]:
            raise UserError(f"guidance in the interval {self.interval}: give [low, high]")
        self.spacing(cosine, self.steps)  # a wrong number of steps is refused before training

    @torch.no_grad()
    def __call__(
        self,
        process: Process,
        net: Net,
        shape: tuple[int, ...],
        cond: Joinable,
        weaker: Weaker | None,
        noise: Noise,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "b *d"]:
        """x0 of this shape [b, ...].

        Args:
            weaker: the branch that guidance leads away from; None: no guidance.
            noise: drawn from for the start and in each step of a stochastic solver.
            progress: called with (steps done, steps in all).
        """
        logsnrs = self.logsnrs(process)
        denoise, done = self.denoiser(process, net, cond, weaker), 1

        def reported(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
            nonlocal done
            denoised = denoise(x, logsnr)
            done = max(done, int((logsnrs <= logsnr).sum()))  # churn goes back to noisier levels
            if progress:
                progress(done, self.steps)
            return denoised

        x = self.init * alpha_sigma(logsnrs[0])[1] * noise(shape)
        return self.solver(reported, x, logsnrs, noise)

    def logsnrs(self, process: Process) -> Float64[Tensor, " n"]:
        """The levels [steps + 1], on the CPU, from the noisiest to clean (+inf).

        The first is at least -`LIMIT`, the lowest that a network is told: there Heun's x / alpha
        and eps-prediction's 1 / alpha are still finite.
        """
        return self.spacing(process.schedule, self.steps).clamp(min=-LIMIT)

    def denoiser(
        self, process: Process, net: Net, cond: Joinable, weaker: Weaker | None
    ) -> Denoiser:
        """The denoiser that is solved: guided and thresholded."""

        def plain(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
            return process.denoise(net, x, logsnr, cond)

        denoise: Denoiser = plain
        if weaker is not None and self.scale != 1:
            denoise = self.guide(_pair(process, net, cond, weaker), self.scale)
            if self.interval:
                denoise = interval(denoise, plain, *self.interval)
        return self.threshold(denoise) if self.threshold else denoise


def _pair(process: Process, net: Net, cond: Joinable, weaker: Weaker) -> Pair:
    """Both branches: of one network in one doubled batch, of two one after the other."""
    other, told = weaker
    both = cond.cat(told) if other is net else None

    def pair(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> tuple[Denoised, Denoised]:
        if both is None:
            return process.denoise(net, x, logsnr, cond), process.denoise(other, x, logsnr, told)
        denoised = process.denoise(net, torch.cat([x, x]), logsnr, both)
        halves = [(None, None) if part is None else part.chunk(2) for part in denoised]
        return tuple(Denoised(*parts) for parts in zip(*halves))

    return pair
