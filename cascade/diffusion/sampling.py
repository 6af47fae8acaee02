"""`DiffusionSampler`: every decision of sampling, in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cascade.diffusion.distillation import Distilled
from cascade.diffusion.gaussian import Denoised, Denoiser, Net, Process
from cascade.diffusion.guidance import Pair, extrapolate, interval
from cascade.diffusion.noise import LIMIT, Noise, alpha_sigma, cosine
from cascade.diffusion.spacing import Spacing, even
from cascade.errors import UserError

Solver = Callable[[Denoiser, Tensor, Tensor, Noise], Tensor]
Watch = Callable[[int, int, Tensor], None]  # (steps done, total steps, x0 so far)


@runtime_checkable
class Joinable(Protocol):
    """A condition that can be concatenated with another along the batch."""

    def cat(self, other: "Joinable") -> "Joinable": ...


# A network and its condition: the same network, unconditional, or a weaker one (autoguidance).
Weaker = tuple[Net, Joinable]


@dataclass(frozen=True)
class DiffusionSampler:
    """Draws x0 from a trained process.

    Args:
        steps: number of solver steps.
        solver: one of `solvers`.
        scale: guidance scale; 1 is no guidance and costs one branch.
        guide: combines the two branches into a guided denoiser, given the scale.
        interval: noise levels (low, high] in sigma / alpha that are guided; high may be infinite.
            None: all.
        threshold: wraps the guided denoiser.
        spacing: (schedule, steps) -> logsnrs [steps + 1].
        init: factor of the initial noise (GLIDE's upsampler: 0.997).

    Raises:
        UserError: fewer than one step, a number of steps that `spacing` does not support, or an
            empty interval.
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
        self.spacing(cosine, self.steps)  # refuses a wrong number of steps before training starts

    @torch.no_grad()
    def __call__(
        self,
        process: Process,
        net: Net,
        shape: tuple[int, ...],
        cond: Joinable,
        weaker: Weaker | None,
        noise: Noise,
        progress: Watch | None = None,
    ) -> Float[Tensor, "b *d"]:
        """Draws x0 of this shape [b, ...].

        Args:
            weaker: the branch that guidance extrapolates away from; None: no guidance.
            noise: called for the initial noise, and in each step of a stochastic solver.
            progress: called after each evaluation of the denoiser; what it raises ends sampling.
        """
        logsnrs = self.logsnrs(process)
        denoise = watched(self.denoiser(process, net, cond, weaker), logsnrs, progress)
        x = self.init * alpha_sigma(logsnrs[0])[1] * noise(shape)
        return self.solver(denoise, x, logsnrs, noise)

    def logsnrs(self, process: Process) -> Float64[Tensor, " n"]:
        """The levels [steps + 1], on the CPU, from the noisiest to clean (+inf).

        The first is clamped to -`LIMIT`, the lowest that networks read, so that Heun's x / alpha
        and eps-prediction's 1 / alpha are finite. A distilled process knows its own levels alone.

        Raises:
            UserError: the process was distilled for another number of steps.
        """
        if isinstance(process, Distilled):
            if self.steps != process.steps:
                raise UserError(f"steps={self.steps}: it was distilled for {process.steps} steps")
            return process.levels
        return self.spacing(process.schedule, self.steps).clamp(min=-LIMIT)

    def denoiser(
        self, process: Process, net: Net, cond: Joinable, weaker: Weaker | None
    ) -> Denoiser:
        """The denoiser given to the solver, guided and thresholded."""

        def plain(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
            return process.denoise(net, x, logsnr, cond)

        denoise: Denoiser = plain
        if weaker is not None and self.scale != 1:
            denoise = self.guide(_pair(process, net, cond, weaker), self.scale)
            if self.interval:
                denoise = interval(denoise, plain, *self.interval)
        return self.threshold(denoise) if self.threshold else denoise


def watched(
    denoise: Denoiser, logsnrs: Float[Tensor, " n"], progress: Watch | None, back: bool = False
) -> Denoiser:
    """The same denoiser, after each evaluation of which `progress` is called.

    Args:
        logsnrs: the levels [steps + 1] of the solver, from the noisiest to the cleanest.
        back: whether it goes from the cleanest to the noisiest, as an inversion does.
    """
    if progress is None:
        return denoise
    done = 1

    def seen(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> Denoised:
        nonlocal done
        denoised = denoise(x, logsnr)
        passed = logsnrs >= logsnr if back else logsnrs <= logsnr
        # It never falls, although churn revisits noisier levels, nor exceeds the steps.
        done = min(max(done, int(passed.sum())), len(logsnrs) - 1)
        progress(done, len(logsnrs) - 1, denoised.x0)
        return denoised

    return seen


def _pair(process: Process, net: Net, cond: Joinable, weaker: Weaker) -> Pair:
    """Both branches: one doubled batch if they share a network, else two calls."""
    other, other_cond = weaker
    both = cond.cat(other_cond) if other is net else None

    def pair(x: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""]) -> tuple[Denoised, Denoised]:
        if both is None:
            own = process.denoise(net, x, logsnr, cond)
            return own, process.denoise(other, x, logsnr, other_cond)
        denoised = process.denoise(net, torch.cat([x, x]), logsnr, both)
        halves = [(None, None) if part is None else part.chunk(2) for part in denoised]
        first, second = zip(*halves)
        return Denoised(*first), Denoised(*second)

    return pair
