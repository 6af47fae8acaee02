"""Significance tests for sweeps: analysis of variance over trainings, with seeds as replicates.

Two factors: sums of squares are of type II (each factor given the other), which is correct also for
sweeps with gaps. One factor: the seeds are blocks, because all values share captions and noise, and
Tukey's intervals remain valid for the best value although it was selected after the fact. Every F
test is accompanied by a permutation test, which does not assume normality.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from cascade.eval.metrics.interval import of_share

SIGNIFICANT = 0.05  # p-value
DRAWS = 9999  # permutations or simulations: a p of 0.05 has a standard error of 0.002


class Effect(NamedTuple):
    """The effect of a factor: eta2 is its share of the total variance, omega2 the unbiased share.

    `permuted` is the p-value of the permutation test; None: it was not run.
    """

    squares: float
    df: int
    f: float
    p: float
    eta2: float
    omega2: float
    permuted: float | None = None


class TwoWay(NamedTuple):
    """Two factors and their interaction (None: with one seed, the interaction is the error term).

    `more` is the p-value of the hypothesis that both factors have equal effects.
    """

    a: Effect
    b: Effect
    interaction: Effect | None
    error: float  # mean square
    df: int  # of the error
    more: float


def two_way(
    y: Sequence[float | int], a: Sequence[object], b: Sequence[object], draws: int = DRAWS
) -> TwoWay:
    """Analyse the variance of outcomes y under levels a and b of two factors, gaps allowed.

    Raises:
        ValueError: a factor has one level, or there are too few outcomes for an error.
    """
    values, a_of, b_of = np.asarray(y, float), _one_hot(a), _one_hot(b)
    if min(a_of.shape[1], b_of.shape[1]) < 2:
        raise ValueError("a factor needs two levels")
    both, cells = _span(np.hstack([a_of, b_of])), _span(_one_hot(list(zip(a, b))))
    of_a, of_b = both - _span(b_of), both - _span(a_of)
    interaction, error = cells - both, np.eye(len(values)) - cells
    if not (own_error := _df(error)):
        error = interaction
    if min(_df(of_a), _df(of_b), _df(error)) < 1:
        raise ValueError("too few outcomes to tell two factors apart")
    total = float(((values - values.mean()) ** 2).sum())

    def effect(part: np.ndarray, groups: np.ndarray | None = None) -> Effect:
        found = _effect(values, part, error, total)
        if groups is None:
            return found
        return found._replace(permuted=_permuted(values, part, error, groups, draws))

    first, second = effect(of_a, b_of), effect(of_b, a_of)
    ms = _squares(values, error) / _df(error)
    return TwoWay(
        first,
        second,
        effect(interaction) if own_error and _df(interaction) else None,
        ms,
        _df(error),
        _equal_effects(first, second, ms, _df(error), draws),
    )


class Blocks(NamedTuple):
    """A randomized block design: means of one factor's values, and the test of any difference.

    `least` is the smallest p-value that a permutation test with so few seeds can give.
    """

    means: Float[np.ndarray, " k"]
    seeds: int
    f: float
    p: float
    permuted: float
    least: float
    error: float
    df: int

    def difference(self, i: int, j: int) -> tuple[float, float, float, float]:
        """Return value i minus value j, Tukey's simultaneous 95 % interval, and its p-value."""
        d, k = float(self.means[i] - self.means[j]), len(self.means)
        scale = math.sqrt(self.error / self.seeds)
        half = _tukey(k, self.df) * scale
        if not scale:
            return d, d, d, float(d == 0)
        return d, d - half, d + half, float(stats.studentized_range.sf(abs(d) / scale, k, self.df))


@cache
def _tukey(k: int, df: int) -> float:
    return float(stats.studentized_range.ppf(0.95, k, df))


def blocks(table: Float[np.ndarray, "seeds k"], draws: int = DRAWS) -> Blocks:
    """Analyse a randomized block design; ValueError with fewer than two seeds or values."""
    n, k = table.shape
    if min(n, k) < 2:
        raise ValueError("a test needs two values under two seeds")
    df = (n - 1) * (k - 1)

    def parts(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [..., n, k] -> squares
        centre = y.mean((-2, -1), keepdims=True)
        value, seed = y.mean(-2, keepdims=True), y.mean(-1, keepdims=True)
        rest = ((y - value - seed + centre) ** 2).sum((-2, -1))
        return np.asarray(n * ((value - centre) ** 2).sum((-2, -1))), np.asarray(rest)

    between, rest = (float(part) for part in parts(table))
    rng = np.random.default_rng(0)
    shuffled = parts(rng.permuted(np.broadcast_to(table, (draws, n, k)), axis=-1))
    f = _ratio(between / (k - 1), rest / df)
    return Blocks(
        table.mean(0),
        n,
        f,
        float(stats.f.sf(f, k - 1, df)),
        _share(between, rest, *shuffled),
        1 / math.factorial(k) ** (n - 1),
        rest / df,
        df,
    )


def rates_differ(
    right: tuple[float | int, float | int], counts: tuple[int, int], level: float = 0.95
) -> tuple[float, float]:
    """Return an interval of the first rate minus the second (Newcombe 1998, method 10).

    It assumes independent captions; if both rates share their captions, it is slightly too wide.
    """
    d = right[0] - right[1]
    (low1, high1), (low2, high2) = (of_share(p, n, level) for p, n in zip(right, counts))
    below = math.hypot(right[0] - low1, high2 - right[1])
    return d - below, d + math.hypot(high1 - right[0], right[1] - low2)


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _one_hot(levels: Sequence[object]) -> np.ndarray:
    names = list(dict.fromkeys(levels))
    return np.array([[level == name for name in names] for level in levels], float)


def _span(columns: np.ndarray) -> np.ndarray:
    """Return the projection onto the span of some columns."""
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    kept = left[:, singular > 1e-9 * singular[0]]
    return kept @ kept.T


def _df(part: np.ndarray) -> int:
    return round(float(np.trace(part)))


def _squares(y: np.ndarray, part: np.ndarray) -> float:
    return float(y @ part @ y)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else (math.inf if above > 0 else 0.0)


def _effect(y: np.ndarray, part: np.ndarray, error: np.ndarray, total: float) -> Effect:
    df, df_error = _df(part), _df(error)
    squares, ms = max(0.0, _squares(y, part)), max(0.0, _squares(y, error)) / df_error
    f = _ratio(squares / df, ms)
    share = _ratio(squares - df * ms, total + ms) if squares > df * ms else 0.0
    p = float(stats.f.sf(f, df, df_error))
    return Effect(squares, df, f, p, _ratio(squares, total), share)


def _permuted(
    y: np.ndarray, part: np.ndarray, error: np.ndarray, groups: np.ndarray, draws: int
) -> float:
    """Return a factor's p-value by permuting outcomes within each level of the other factor."""
    rng, shuffled = np.random.default_rng(0), np.tile(y, (draws, 1))
    for group in groups.T.astype(bool):
        shuffled[:, group] = rng.permuted(shuffled[:, group], axis=1)
    above, below = (((shuffled @ matrix) * shuffled).sum(1) for matrix in (part, error))
    return _share(_squares(y, part), _squares(y, error), above, below)


def _share(above: float, below: float, aboves: np.ndarray, belows: np.ndarray) -> float:
    """Return the share of ratios, the observed one included, at least as large as the observed."""
    tolerance = 1e-9 * (abs(above) + abs(below))  # equal ratios differ in their last digits
    as_large = aboves * below >= above * belows - tolerance * (np.abs(belows) + np.abs(aboves))
    return (1 + int(as_large.sum())) / (1 + len(aboves))


def _equal_effects(a: Effect, b: Effect, ms: float, df: int, draws: int) -> float:
    """Return the two-sided p-value of the hypothesis that a and b have equal effects.

    A factor's sum of squares over the error variance is noncentral chi-squared. Under the null both
    factors have their average noncentrality, and the error variance is drawn from its posterior
    given the error's sum of squares.
    """
    if ms <= 0:
        return float(a.squares == b.squares)
    rng = np.random.default_rng(0)
    per_variance = rng.chisquare(df, draws) / df / ms
    both = (a.squares + b.squares) * per_variance
    shared = np.maximum(0, both - a.df - b.df) / 2
    chi_a, chi_b = (rng.noncentral_chisquare(e.df, shared) for e in (a, b))
    observed = np.abs((a.squares - b.squares) * per_variance - (a.df - b.df))
    return (1 + int((np.abs(chi_a - chi_b - (a.df - b.df)) >= observed).sum())) / (1 + draws)
