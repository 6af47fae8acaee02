"""Everything that is decided at inference, in one object."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Denoiser, Net, Process
from cascade.diffusion.guidance import Pair, extrapolate, interval
from cascade.diffusion.noise import Noise, alpha_sigma
from cascade.errors import UserError

Solver = Callable[[Denoiser, Tensor, Tensor, Noise], Tensor]


@runtime_checkable
class Joinable(Protocol):
    """A condition: two can be joined into one batch."""

    def cat(self, other: "Joinable") -> "Joinable": ...


@dataclass(frozen=True)
class DiffusionSampler:
    """Draws x0 from a trained process.

    Args:
        steps: of the solver.
        solver: one of `solvers`.
        scale: of guidance; 1 is none, and costs one branch.
        guide: makes the guided denoiser of the two branches and the scale.
        interval: EDM noise levels (low, high] outside of which there is no guidance.
        threshold: wraps the guided denoiser.
        spacing: steps -> logsnrs [steps + 1]; None: even in u of the process's schedule.
        init: factor of the first noise (GLIDE's upsampler: 0.997).
    """

    steps: int
    solver: Solver
    scale: float = 1.0
    guide: Callable[[Pair, float], Denoiser] = extrapolate
    interval: tuple[float, float] | None = None
    threshold: Callable[[Denoiser], Denoiser] | None = None
    spacing: Callable[[int], Tensor] | None = None
    init: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"a sampler of {self.steps} steps: it needs at least 1")

    @torch.no_grad()
    def __call__(
        self,
        process: Process,
        net: Net,
        shape: tuple[int, ...],
        cond: Joinable,
        null: Joinable | None,
        noise: Noise,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "b *d"]:
        """x0 of this shape [b, ...].

        Args:
            null: the condition of the unguided branch; None: no guidance.
            noise: drawn from for the start and in each step of a stochastic solver.
            progress: called with (steps done, steps in all).
        """
        logsnrs = self.logsnrs(process)
        denoise = self.denoiser(process, net, cond, null)

        def reported(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
            denoised = denoise(x, logsnr)
            if progress:
                progress(int((logsnrs <= logsnr).sum()), self.steps)
            return denoised

        x = self.init * alpha_sigma(logsnrs[0])[1] * noise(shape)
        return self.solver(reported, x, logsnrs, noise)

    def logsnrs(self, process: Process) -> Float64[Tensor, " n"]:
        """The levels [steps + 1], on the CPU, from the noisiest to clean (+inf).

        The last step always leads to clean, even where the schedule keeps some noise at u = 0.
        The first level is at least -20, the lowest that a network is told: there Heun's x / alpha
        and eps-prediction's 1 / alpha are still finite, and alpha is 5e-5.
        """
        if self.spacing:
            return self.spacing(self.steps)
        logsnrs = process.schedule(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64))
        logsnrs[-1] = math.inf
        return logsnrs.clamp(min=-20)

    def denoiser(
        self, process: Process, net: Net, cond: Joinable, null: Joinable | None
    ) -> Denoiser:
        """The denoiser that is solved: guided, both branches in one doubled batch; thresholded."""

        def plain(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
            return process.denoise(net, x, logsnr, cond)

        denoise: Denoiser = plain
        if null is not None and self.scale != 1:
            denoise = self.guide(_doubled(process, net, cond.cat(null)), self.scale)
            if self.interval:
                denoise = interval(denoise, plain, *self.interval)
        return self.threshold(denoise) if self.threshold else denoise


def _doubled(process: Process, net: Net, both: Joinable) -> Pair:
    def pair(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> tuple[Denoised, Denoised]:
        x0, var = process.denoise(net, torch.cat([x, x]), logsnr, both)
        vars = (None, None) if var is None else var.chunk(2)
        return tuple(Denoised(*parts) for parts in zip(x0.chunk(2), vars))

    return pair
