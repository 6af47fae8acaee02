"""Averages of a run's weights whose length is chosen after training (EDM2, 2312.02696, section 3).

A power-function average at step t weights the weights of step k in proportion to k^gamma, so that
it has the same form, whatever t. Its length is the standard deviation of that profile as a share of
t (the paper's sigma_rel). A run that keeps snapshots of two such averages can have any other
reconstructed: the mixture of snapshots whose profile comes closest, by least squares (appendix C).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cascade.encoders.weights import reading
from cascade.errors import UserError
from cascade.runs.run import Run

WORST = 0.1  # greatest distance of a mixture's profile from the one asked for, as a share of it
SHORTEST, LONGEST = 0.01, 0.28  # gamma = 0, which weights all steps alike, has the length 0.289


class Profile(NamedTuple):
    """The density of weights over steps of an average: proportional to k^gamma up to `step`."""

    step: float
    gamma: float

    def product(self, other: "Profile") -> float:
        """The integral of both densities' product (appendix C)."""
        end, gammas = min(self.step, other.step), (self.gamma, other.gamma)
        first, second = ((end / p.step) ** p.gamma * (p.gamma + 1) for p in (self, other))
        return first * second * end / (self.step * other.step * (sum(gammas) + 1))


def exponent(length: float) -> float:
    """The gamma of an average of a length: (gamma + 1)^1/2 / ((gamma + 2) (gamma + 3)^1/2) is it.

    Raises:
        UserError: the length is out of range.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"length={length:g}: give a share of the training, {SHORTEST} to {LONGEST}")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


def decay(step: int, gamma: float) -> float:
    """The decay of the average at a step, from 1 on: (1 - 1 / t)^(gamma + 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def mixture(kept: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The weights, of sum 1, with which averages add up to the one that comes closest to another.

    Returns:
        The weights, and the distance of the two profiles as a share of the wanted one (L2).
    """
    n = len(kept)
    products = np.array([[one.product(other) for other in kept] for one in kept])
    towards = np.array([one.product(wanted) for one in kept])
    # The sum is a constraint with a Lagrange multiplier, so that what does not change stays.
    system = np.block([[products, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(towards, 1), rcond=None)[0][:n]
    own = wanted.product(wanted)
    squared = weights @ products @ weights - 2 * weights @ towards + own
    return weights.tolist(), float(np.sqrt(max(0.0, squared) / own))


def reconstructed(run: Run, length: float) -> dict[str, Tensor]:
    """The weights of a run, averaged over a length that ends at its last snapshot, by name.

    Raises:
        UserError: the run kept no averages, or none of this length can be made of them.
    """
    gamma, paths = exponent(length), [path for _, path in run.snapshots()]
    if not paths:
        raise UserError(f"{run.path} kept no averages: train it with averages=power")
    with reading(paths, str(run.path)), ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        kept, places = [], []
        for file in files:
            step = int(file.metadata()["step"])
            for prefix in sorted({name.partition("/")[0] for name in file.keys()}):  # noqa: SIM118
                kept.append(Profile(step, exponent(float(prefix))))
                places.append((file, prefix))
        weights, distance = mixture(kept, Profile(kept[-1].step, gamma))
        if distance > WORST:
            raise UserError(
                f"{run.path}: an average of length {length:g} would be off by {distance:.0%}: "
                "choose a length nearer to those kept, or train with more averages.snapshots"
            )
        names = [name.partition("/")[2] for name in _names(*places[0])]
        return {
            name: sum(
                weight * file.get_tensor(f"{prefix}/{name}").double()
                for weight, (file, prefix) in zip(weights, places)
            ).float()
            for name in names
        }


def _names(file: safe_open, prefix: str) -> Iterator[str]:
    return (name for name in file.keys() if name.startswith(f"{prefix}/"))  # noqa: SIM118


def averaged(module: torch.nn.Module, run: Run, length: float) -> None:
    """Gives a module of a run the weights of an average; raises as `reconstructed` does."""
    module.load_state_dict({**module.state_dict(), **reconstructed(run, length)})
