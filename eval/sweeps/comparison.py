"""Comparison of the values of a factor: the best against every other one, with significance.

Values are paired by seed and by all other factors, because such cells share captions and noise. If
the values share their trained networks, accuracies are compared over captions; everything else is
compared over seeds. Distances, including that of a CLIP score from 1, are compared by their ratio:
their scatter grows in proportion to them, a hundredfold from good cells to bad ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.eval.metrics.measures import ACCURACY, Measure
from cascade.eval.pages.report import text
from cascade.eval.pages.spread import TINY, Spread, spread
from cascade.eval.sweeps.results import Cell, Value, Values, shown
from cascade.eval.sweeps.significance import SIGNIFICANT, Blocks, blocks, p_text, rates_differ

OWN = "own"  # as a held value: hold the factor where each compared value is best


@dataclass(frozen=True)
class Pair:
    """How much better the best value is than another, with a simultaneous 95 % interval and p.

    Args:
        ratio: whether `gain` is the ratio of the other's distance to the best one's, and not a
            difference.
    """

    other: int
    gain: float
    low: float
    high: float
    p: float | None = None
    ratio: bool = False

    @property
    def significant(self) -> bool:
        return self.low > (1 if self.ratio else 0)

    @property
    def interval(self) -> str:
        low, high = (f"{end:.{self._digits}g}" for end in (self.low, self.high))
        return f"[{low}, {high}]"

    @property
    def _digits(self) -> int:
        return 4 if self.ratio else 3

    def __str__(self) -> str:
        return f"{'× ' if self.ratio else 'by '}{self.gain:.{self._digits}g}, {self.interval}"


@dataclass(frozen=True)
class Comparison:
    """The values of a factor, compared with the best of them.

    Args:
        spreads: over the seeds that all values share, or over each value's own if they share none.
        over: what the intervals are taken over, "seeds" or "captions"; "": there are none.
    """

    measure: Measure
    at: Values
    values: Sequence[Values]
    spreads: Sequence[Spread]
    pairs: Sequence[Pair]
    over: str
    test: Blocks | None

    @property
    def best(self) -> int:
        return self.measure.best([s.mean for s in self.spreads])

    def short(self) -> str:
        """State which value is best."""
        best, measure = self.spreads[self.best], self.measure.name
        head = f"{label(self.values[self.best])} has the best {measure}{where(self.at)}"
        return f"{head}: {text(best[:2])}, n = {best.n}."

    def sentence(self) -> str:
        """State which value is best, and than which others it is significantly better."""
        if not self.over:
            return f"{self.short()} {_others(self)}; too few seeds for a test."
        parts = [self.short()]
        verbs = {True: "significantly better than", False: "not significantly better than"}
        for significant, verb in verbs.items():
            chosen = [pair for pair in self.pairs if pair.significant == significant]
            if chosen:
                others = [f"{label(self.values[pair.other])} ({pair})" for pair in chosen]
                parts.append(f"It is {verb} {'; '.join(others)}.")
        parts.append(f"Intervals: simultaneous 95 % for all pairs, over {self.over}.")
        if any(pair.ratio for pair in self.pairs):
            of = "" if self.measure.less else " from 1"
            parts[-1] = f"{parts[-1][:-1]}; × is the ratio of distances{of}."
        if self.test:
            parts.append(
                f"Test of any difference: F = {self.test.f:.3g}, {p_text(self.test.p)}; "
                f"by permutation {p_text(self.test.permuted)} (smallest possible: "
                f"{self.test.least:.2g})."
            )
        return " ".join(parts)

    def control_sentence(self, control: Value) -> str:
        """State how much worse the control is than the best value."""
        pair = next((p for p in self.pairs if control in self.values[p.other].values()), None)
        if pair is None:
            return f"Including the control: {self.sentence()}"
        significantly = "significantly" if pair.significant else "not significantly"
        return (
            f"The control, {shown(control)}, is {significantly} worse than "
            f"{label(self.values[self.best])}: {pair}."
        )

    def verdict(self, expected: Sequence[object]) -> str:
        """State whether this agrees with the values that the papers found best."""
        wanted = [any(v in expected for v in values.values()) for values in self.values]
        rival = [pair for pair in self.pairs if wanted[pair.other] != wanted[self.best]]
        if not rival:
            return "undecided: the papers' best value, or every other one, has not run"
        means = [self.spreads[pair.other].mean for pair in rival]
        return agreement(wanted[self.best], rival[self.measure.best(means)].significant)

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Return columns and rows, in the factor's order."""
        better = (
            "distance as a multiple of the best" if self.measure.distance else "best is better by"
        )
        columns = ["", self.measure.name, "n", better, "95 % interval", "p"]
        rows: list[list[object]] = []
        for i, (values, found) in enumerate(zip(self.values, self.spreads)):
            pair = next((pair for pair in self.pairs if pair.other == i), None)
            gap = [pair.gain, pair.interval, pair.p] if pair else [None, None, None]
            rows.append([label(values), found[:2], found.n, *gap])
        return columns, rows


def comparison(
    measure: Measure,
    at: Values,
    values: Sequence[Values],
    cells: Sequence[Mapping[object, Cell]],
    by_captions: bool,
) -> Comparison:
    """Compare values; `cells` has for each value its cells, by a key that pairs them."""
    shared = sorted(set.intersection(*(set(own) for own in cells)), key=str)
    table = np.array([[own[key][measure.key] for own in cells] for key in shared], float)
    used = [[own[key] for key in shared or own] for own in cells]
    spreads = [spread([row[measure.key] for row in own]) for own in used]
    best = measure.best([s.mean for s in spreads])
    others = [i for i in range(len(values)) if i != best]
    if measure.distance:
        table = np.log(np.maximum(measure.distance(table), TINY))
    test = blocks(table) if min(table.shape, default=0) > 1 else None
    if measure == ACCURACY and others and (by_captions or test is None):
        # Bonferroni over all pairs, not only those with the best: it was selected after the fact.
        level = 1 - SIGNIFICANT / (len(values) * len(others) / 2)
        pairs = [_over_captions(used, spreads, best, i, level) for i in others]
        return Comparison(measure, at, values, spreads, pairs, "captions", test)
    pairs = [_over_seeds(measure, test, best, i) for i in others] if test else []
    return Comparison(measure, at, values, spreads, pairs, "seeds" if pairs else "", test)


def _over_seeds(measure: Measure, test: Blocks, i: int, j: int) -> Pair:
    if not measure.distance:
        return Pair(j, *test.difference(i, j))
    # The table holds log-distances, and less is better: the other's minus the best's is the gain.
    *ends, p = test.difference(j, i)
    return Pair(j, *map(math.exp, ends), p, ratio=True)


def _over_captions(
    rows: Sequence[Sequence[Cell]], spreads: Sequence[Spread], i: int, j: int, level: float
) -> Pair:
    counts = [sum(_judged(row) for row in rows[k]) for k in (i, j)]
    rates = spreads[i].mean, spreads[j].mean
    return Pair(j, rates[0] - rates[1], *rates_differ(rates, (counts[0], counts[1]), level))


def agreement(same: bool, significant: bool) -> str:
    if significant:
        return "agrees" if same else "does not agree"
    return f"undecided ({'same' if same else 'opposite'} tendency)"


def label(values: Values) -> str:
    """Format values: "dynamic" alone, or with the factors' names: "noise yes, level 0.1"."""
    if len(values) == 1 and isinstance(only := next(iter(values.values())), str):
        return only
    return ", ".join(
        v if isinstance(v, str) and name in v else f"{name} {shown(v)}"  # as "text_96" of "text"
        for name, v in values.items()
    )


def where(at: Values) -> str:
    fixed = ", ".join(f"{name} {shown(v)}" for name, v in at.items() if v != OWN)
    own = " and ".join(name for name, v in at.items() if v == OWN)
    return (f" at {fixed}" if fixed else "") + (f", each at its best {own}" if own else "")


def _others(found: Comparison) -> str:
    named = [
        f"{label(values)} {text(found.spreads[i][:2])}"
        for i, values in enumerate(found.values)
        if i != found.best
    ]
    return f"Others: {', '.join(named)}" if named else "Nothing else has run"


def _judged(row: Cell) -> int:
    """Return the number of captions with a scene, of which an accuracy is the rate."""
    kinds = [int(row[key]) for key in ("one.count", "two.count") if key in row]
    return sum(kinds) or int(row["count"])
