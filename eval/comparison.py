"""The values of a factor beside each other: the best against each other one, and how sure.

Values are paired by seed, and by all else but the factor, since these share captions and noise.
Rates of trained networks that stay the same are compared over captions; all else over seeds.
Distances, and that of a CLIP score from 1, are compared by their ratio: bad cells scatter a hundred
times as much as good ones, but in proportion about alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.eval.ablation import ACCURACY, TINY, Measure, Row, Spread, Value, Values, shown, spread
from cascade.eval.report import text
from cascade.eval.significance import Blocks, blocks, rates_differ

SURE = 0.05  # p
OWN = "own"  # in the place of a held value: each value's own best one


@dataclass(frozen=True)
class Pair:
    """By how much the best value is better than another, a simultaneous 95 % interval, and p.

    Args:
        ratio: whether that is how many times the other's distance is the best one's.
    """

    other: int
    gain: float
    low: float
    high: float
    p: float | None = None
    ratio: bool = False

    @property
    def sure(self) -> bool:
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
    """The values of a factor beside each other, best and others.

    Args:
        spreads: over the seeds that all values have; over each value's own where they share none.
        over: what the intervals are over: "seeds" or "captions"; "": there are none.
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
        """Who is best."""
        best, measure = self.spreads[self.best], self.measure.name
        head = f"{label(self.values[self.best])} has the best {measure}{where(self.at)}"
        return f"{head}: {text(best[:2])}, n = {best.n}."

    def sentence(self) -> str:
        """Who is best, and against whom that is sure."""
        if not self.over:
            return f"{self.short()} {_others(self)}; too few seeds for a test."
        parts = [self.short()]
        for sure, verb in ((True, "surely better than"), (False, "not surely better than")):
            chosen = [pair for pair in self.pairs if pair.sure == sure]
            if chosen:
                parts.append(f"It is {verb} {'; '.join(map(self._against, chosen))}.")
        parts.append(f"Intervals: 95 % for all pairs together, over {self.over}.")
        if any(pair.ratio for pair in self.pairs):
            of = "" if self.measure.less else " from 1"
            parts[-1] = f"{parts[-1][:-1]}; × is the ratio of distances{of}."
        if self.test:
            parts.append(
                f"Whether the value matters at all: F = {self.test.f:.3g}, {p_text(self.test.p)}; "
                f"by permutation {p_text(self.test.permuted)} (smallest possible: "
                f"{self.test.least:.2g})."
            )
        return " ".join(parts)

    def beside(self, control: Value) -> str:
        """How far the control is behind the best value."""
        pair = next((p for p in self.pairs if control in self.values[p.other].values()), None)
        if pair is None:
            return f"With the control: {self.sentence()}"
        surely = "surely " if pair.sure else "not surely "
        return (
            f"The control, {shown(control)}, is {surely}worse than "
            f"{label(self.values[self.best])}: {pair}."
        )

    def verdict(self, expected: Sequence[object]) -> str:
        """How this agrees with the papers' best values."""
        wanted = [any(v in expected for v in values.values()) for values in self.values]
        rival = [pair for pair in self.pairs if wanted[pair.other] != wanted[self.best]]
        if not rival:
            return "not decided: what the papers found best, or all else, has not run"
        means = [self.spreads[pair.other].mean for pair in rival]
        return agreement(wanted[self.best], rival[self.measure.best(means)].sure)

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows, in the factor's order."""
        better = "× the best's distance" if self.measure.distance else "the best is better by"
        columns = ["", self.measure.name, "n", better, "95 % interval", "p"]
        rows: list[list[object]] = []
        for i, (values, found) in enumerate(zip(self.values, self.spreads)):
            pair = next((pair for pair in self.pairs if pair.other == i), None)
            gap = [pair.gain, pair.interval, pair.p] if pair else [None, None, None]
            rows.append([label(values), found[:2], found.n, *gap])
        return columns, rows

    def _against(self, pair: Pair) -> str:
        return f"{label(self.values[pair.other])} ({pair})"


def comparison(
    measure: Measure,
    at: Values,
    values: Sequence[Values],
    cells: Sequence[Mapping[object, Row]],
    by_captions: bool,
) -> Comparison:
    """`cells`: of each value its rows, by what pairs them with the other values' rows."""
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
        level = 1 - SURE / (len(values) * len(others) / 2)
        pairs = [_over_captions(used, spreads, best, i, level) for i in others]
        return Comparison(measure, at, values, spreads, pairs, "captions", test)
    pairs = [_over_seeds(measure, test, best, i) for i in others] if test else []
    return Comparison(measure, at, values, spreads, pairs, "seeds" if pairs else "", test)


def _over_seeds(measure: Measure, test: Blocks, i: int, j: int) -> Pair:
    if not measure.distance:
        return Pair(j, *test.difference(i, j))
    *ends, p = test.difference(j, i)
    return Pair(j, *map(math.exp, ends), p, ratio=True)


def _over_captions(
    rows: Sequence[Sequence[Row]], spreads: Sequence[Spread], i: int, j: int, level: float
) -> Pair:
    counts = [sum(_judged(row) for row in rows[k]) for k in (i, j)]
    rates = spreads[i].mean, spreads[j].mean
    return Pair(j, rates[0] - rates[1], *rates_differ(rates, (counts[0], counts[1]), level))


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def agreement(same: bool, sure: bool) -> str:
    if sure:
        return "agrees" if same else "does not agree"
    return f"not decided (it points {'the same way' if same else 'the other way'})"


def label(values: Values) -> str:
    """Such as "dynamic", or "noise yes, level 0.1", as these do not say of what."""
    if len(values) == 1 and isinstance(only := next(iter(values.values())), str):
        return only
    return ", ".join(v if _speaks(name, v) else f"{name} {shown(v)}" for name, v in values.items())


def _speaks(name: str, v: Value) -> bool:
    """Whether a value says of what it is one, as "text_96" does."""
    return isinstance(v, str) and name in v


def where(at: Values) -> str:
    fixed = ", ".join(f"{name} {shown(v)}" for name, v in at.items() if v != OWN)
    own = " and ".join(name for name, v in at.items() if v == OWN)
    return (f" at {fixed}" if fixed else "") + (f", each at its best {own}" if own else "")


def title(measure: Measure) -> str:
    return measure.name[0].upper() + measure.name[1:]


def _others(found: Comparison) -> str:
    named = [
        f"{label(values)} {text(found.spreads[i][:2])}"
        for i, values in enumerate(found.values)
        if i != found.best
    ]
    return f"Beside it: {', '.join(named)}" if named else "Nothing else has run"


def _judged(row: Row) -> int:
    """Captions that a rate is of: those with a scene."""
    kinds = [int(row[key]) for key in ("one.count", "two.count") if key in row]
    return sum(kinds) or int(row["count"])
