"""Distillation into few steps: a student takes in one step what its teacher takes in several.

Progressive distillation (2202.00512, algorithm 2), for any whole number of teacher steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Diffusion, Net, call, per_sample
from cascade.diffusion.noise import LIMIT, Noise, Schedule, alpha_sigma, uniform
from cascade.diffusion.spacing import Spacing, even, thinned
from cascade.errors import UserError

# Carries some rows of the batch, at logsnrs[0], to logsnrs[-1], in len(logsnrs) - 1 steps.
Carry = Callable[
    [Bool[Tensor, " b"], Float[Tensor, "r *d"], Float64[Tensor, " n"]], Float[Tensor, "r *d"]
]


@dataclass(frozen=True)
class Distilled:
    """A `Process` whose network knows the levels of a few steps alone.

    At each of these levels its x0_hat is the one from which DDIM's step to the next level arrives
    where the teacher's solver does. The last step arrives at data.

    Args:
        process: schedule, prediction and weight, which are those of the teacher.
        steps: of the student.
        by: the teacher's steps in one of the student's.
        spacing: of the teacher's `steps` x `by` steps.

    Raises:
        UserError: fewer than one step.
    """

    process: Diffusion
    steps: int
    by: int = 2
    spacing: Spacing = even

    def __post_init__(self):
        if min(self.steps, self.by) < 1:
            raise UserError(f"{self.steps} steps, of {self.by} of the teacher's: give at least 1")

    @property
    def schedule(self) -> Schedule:
        return self.process.schedule

    @property
    def taught(self) -> Float64[Tensor, " n"]:
        """The teacher's levels [steps x by + 1]."""
        return self.spacing(self.schedule, self.steps * self.by).clamp(min=-LIMIT)

    @property
    def levels(self) -> Float64[Tensor, " n"]:
        """The student's levels [steps + 1]: every `by`-th of the teacher's."""
        return thinned(self.schedule, self.steps, spacing=self.spacing, by=self.by).clamp(
            min=-LIMIT
        )

    def loss(
        self,
        net: Net,
        x0: Float[Tensor, "b *d"],
        cond: Any,
        noise: Noise,
        teacher: Carry,
    ) -> Float[Tensor, " b"]:
        """The loss of each sample, weighted as the process weights a level.

        Args:
            noise: called twice: for one number per sample, which gives the step, then for eps.
        """
        step = (self.steps * uniform(noise, (len(x0),))).long()
        taught, levels = self.taught, self.levels.to(x0.device)
        t, s = levels[step], levels[step + 1]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        eps = noise(tuple(x0.shape)).to(x0)
        x_t = per_sample(alpha_t, x0) * x0 + per_sample(sigma_t, x0) * eps
        x_s = torch.empty_like(x_t)
        for i in step.unique().tolist():  # all samples at one level together
            rows = step == i
            x_s[rows] = teacher(rows, x_t[rows], taught[self.by * i : self.by * (i + 1) + 1])
        # DDIM's step is x_s = alpha_s x0 + kept (x_t - alpha_t x0).
        kept = sigma_s / sigma_t
        wanted = (x_s - per_sample(kept, x0) * x_t) / per_sample(alpha_s - kept * alpha_t, x0)
        c_in, c_skip, c_out = (per_sample(c, x0) for c in self.process.prediction(t))
        F = call(net, c_in * x_t, t, cond)
        return self.process.weighted(F - (wanted - c_skip * x_t) / c_out, t)

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """Estimates the x0 towards which DDIM's next step leads; raises as the process does."""
        return self.process.denoise(net, x_t, logsnr, cond)
