"""Numbers measured under several seeds: their mean, deviation and extremes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Distance = Callable[[Any], Any]  # maps a value to a distance, and, being its own inverse, back
TINY = 1e-9  # distances below this are treated as this


class Spread(NamedTuple):
    """Mean, standard deviation (None: one seed) and extremes of `n` numbers."""

    mean: float
    deviation: float | None
    low: float
    high: float
    n: int


def spread(numbers: Sequence[float | int]) -> Spread:
    """Summarize the numbers of several seeds."""
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Spread(float(np.mean(numbers)), deviation, min(numbers), max(numbers), len(numbers))
