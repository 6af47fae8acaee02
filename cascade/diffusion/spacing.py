"""Spacings: functions (schedule, steps) -> logsnrs [steps + 1], from noise to +inf, clean.

They choose the levels that a sampler visits. Published samplers choose indices of a table of T
steps. Index i is u = (i + 1) / T of any schedule, so their choices apply to continuous ones, too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from cascade.diffusion.noise import Schedule
from cascade.errors import UserError

Spacing = Callable[[Schedule, int], Float64[Tensor, " n"]]


def even(schedule: Schedule, steps: int) -> Float64[Tensor, " n"]:
    """Levels even in u, from 1 to clean, even if the schedule keeps some noise at u = 0."""
    return _to_clean(schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]))


def karras(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Float64[Tensor, " n"]:
    """EDM's levels (2206.00364, equation 5), in sigma / alpha; the schedule is not used."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64)
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _to_clean(-2 * ((ends[0] + ramp * (ends[1] - ends[0])) ** rho).log())


def strided(schedule: Schedule, steps: int, *, table: int = 1000) -> Float64[Tensor, " n"]:
    """guided-diffusion's `ddimN`: indices 0, k, 2k..., with the least k that gives this many steps.

    It may start well below the noisiest level: 27 steps of 1000 start at index 988, 15 at 938.

    Raises:
        UserError: no whole stride gives this number of steps.
    """
    for stride in range(1, table + 1):
        if len(indices := range(0, table, stride)) == steps:
            return _at(schedule, indices, table)
    raise UserError(f"no whole stride of {table} gives {steps} steps: change steps, or the spacing")


def sections(
    schedule: Schedule, steps: int, *, counts: Sequence[int] | None = None, table: int = 1000
) -> Float64[Tensor, " n"]:
    """Sections of equal length, each with evenly spaced indices (guided-diffusion, GLIDE, IF).

    Args:
        counts: number of steps in each section, the cleanest first; None: one section.

    Raises:
        UserError: `counts` do not sum to `steps`, or exceed the indices of a section.
    """
    return _at(schedule, _indices(steps, counts or (steps,), table), table)


def thinned(
    schedule: Schedule, steps: int, *, spacing: Spacing = even, by: int = 2
) -> Float64[Tensor, " n"]:
    """Every `by`-th level of another spacing (the levels of a distilled stage)."""
    return spacing(schedule, steps * by)[::by]


def fast27(schedule: Schedule, steps: int) -> Float64[Tensor, " n"]:
    """GLIDE's upsampler: sections of 10, 10, 3, 2 and 2 steps, from 997 as in its code, not 999."""
    return _at(schedule, [*_indices(steps, (10, 10, 3, 2, 2), 1000)[:-1], 997], 1000)


def _indices(steps: int, counts: Sequence[int], table: int) -> list[int]:
    if sum(counts) != steps:
        named = ",".join(map(str, counts))
        raise UserError(f"sections {named} have {sum(counts)} steps: set steps={sum(counts)}")
    indices, start = [], 0
    for i, count in enumerate(counts):
        size = table // len(counts) + (i < table % len(counts))
        if not 1 <= count <= size:
            raise UserError(f"{count} steps in a section of {size} indices: take 1 to {size}")
        place, stride = 0.0, (size - 1) / max(count - 1, 1)
        for _ in range(count):
            indices.append(start + round(place))
            place += stride  # summed, so that halves round as in the published code
        start += size
    return indices


def _at(schedule: Schedule, indices: Sequence[int], table: int) -> Float64[Tensor, " n"]:
    return _to_clean(schedule((torch.tensor(indices).flip(0).double() + 1) / table))


def _to_clean(logsnrs: Float64[Tensor, " n"]) -> Float64[Tensor, " m"]:
    return torch.cat([logsnrs, logsnrs.new_tensor([math.inf])])
