"""iDDPM's process (2102.09672): the network learns each step's variance as well as its mean.

The network has twice the channels of x. The first half is F, as in `Diffusion`. The second is v,
which interpolates a step's log variance between those of the posterior (v = -1) and of beta (v = 1)
(equation 15).
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cascade.diffusion.gaussian import Denoised, Diffusion, Net, Targets, call, per_sample
from cascade.diffusion.likelihood import term
from cascade.diffusion.noise import Noise, Schedule, uniform
from cascade.diffusion.posterior import Step, ladder
from cascade.errors import UserError


@dataclass(frozen=True)
class LearnedVariance:
    """A `Process`: the hybrid objective (iDDPM, equation 16), for every prediction type.

    Args:
        mean: schedule, prediction and weight for the first half.
        steps: T; training draws from the levels u = 1 / T, 2 / T ... 1.
    """

    mean: Diffusion
    steps: int = 1000

    @property
    def schedule(self) -> Schedule:
        return self.mean.schedule

    def loss(
        self,
        net: Net,
        x0: Float[Tensor, "b *d"],
        cond: Any,
        noise: Noise,
        teacher: Targets | None = None,
    ) -> Float[Tensor, " b"]:
        """The loss of the mean, plus T / 1000 times one term of the bound in bits per dimension.

        T times the term at a random level estimates the whole bound, which iDDPM weighs by 0.001.
        The mean is detached in it, so it trains the variance alone.

        Args:
            noise: called twice: for one number per sample, which gives the level, then for eps.
            teacher: replaces targets of the mean; None: they are those of x0.
        """
        u = uniform(noise, (len(x0),))
        levels, down = ladder(self.schedule, self.steps, u.device)
        index = (self.steps * u).long()
        logsnr = levels[index]
        x, F_star = self.mean.task(x0, noise(tuple(x0.shape)).to(x0), logsnr)
        F, range = _halves(call(net, x, logsnr, cond), x0)
        error = F - F_star
        c_out = per_sample(self.mean.prediction(logsnr).c_out, x0)
        denoised = Denoised(x0 + c_out * error.detach(), range=range)
        step = Step(*(per_sample(part[index], x0) for part in down))
        bits = term(x0, denoised, step, first=per_sample(index.double(), x0) == 0)
        taught = error if teacher is None else F - teacher(x, logsnr, F_star)
        return self.mean.weighted(taught, logsnr) + self.steps / 1000 * bits

    def denoise(
        self, net: Net, x_t: Float[Tensor, "b *d"], logsnr: Float[Tensor, ""], cond: Any
    ) -> Denoised:
        """Estimates x0 and the range at one noise level, which is the same for the whole batch.

        Raises:
            ValueError: eps-prediction at logsnr = -inf, where F does not determine x0.
        """
        c_in = self.mean.prediction(logsnr).c_in
        F, range = _halves(call(net, c_in * x_t, logsnr.expand(len(x_t)), cond), x_t)
        return Denoised(self.mean.x0_hat(F, x_t, logsnr), range=range)


def _halves(
    out: Float[Tensor, "b ..."], x: Float[Tensor, "b *d"]
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """Splits the output into F and the range (v + 1) / 2."""
    if out.shape[1] != 2 * x.shape[1]:
        raise UserError(
            f"a learned variance needs a network with {2 * x.shape[1]} output channels, "
            f"twice those of x; this one has {out.shape[1]}: set net.learned_variance=true"
        )
    F, v = out.chunk(2, 1)
    return F, (v + 1) / 2
