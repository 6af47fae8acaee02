"""What a sweep found, in sentences, each with the test behind it.

The question is of the trained axes, or else of the first choice. Of two axes: which explains more
of the outcome's variance. Otherwise: the best value against each other one, under the same captions
and noise. All other choices (the guidance scale) are held where they are best on average over all
that ran, so that no value is favoured, unless the sweep says where to look (`at`): at a value, or
each at its own best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.eval.ablation import (
    ACCURACY,
    EVALUATIONS,
    SEED,
    STEPS,
    Measure,
    Row,
    Sweep,
    Value,
    Values,
    combinations,
    value,
)
from cascade.eval.comparison import (
    OWN,
    SURE,
    Comparison,
    agreement,
    comparison,
    label,
    p_text,
    title,
    where,
)
from cascade.eval.significance import Effect, TwoWay, two_way

SIGNAL = 0.3  # scene accuracy of the best cell under which nothing is concluded


@dataclass(frozen=True)
class Factorial:
    """Two trained factors (`names`), their table of variance (None: too little has run).

    `control`: the control beside the sizes of its factor.
    """

    measure: Measure
    at: Values
    names: tuple[str, str]
    n: int
    test: TwoWay | None
    control: Comparison | None = None

    def short(self) -> str:
        """Which factor explains more, and whether that is sure."""
        head = f"{title(self.measure)}{where(self.at)}:"
        if self.test is None:
            return f"{head} too little has run to tell the factors apart."
        matter = [n for n, effect in zip(self.names, self.test[:2]) if effect.p < SURE]
        alike = f"{p_text(self.test.more)} if both explained alike"
        if self.test.more < SURE:
            one, other = self._ordered()
            return f"{head} {one} explains surely more than {other} ({alike})."
        if not matter:
            return f"{head} neither {' nor '.join(self.names)} is told from chance."
        told = " and ".join(matter) + (" are" if len(matter) > 1 else " is")
        undecided = f"which explains more is not decided ({alike}; so far {self._ordered()[0]})"
        return f"{head} {told} told from chance; {undecided}."

    def sentence(self) -> str:
        """Which factor explains more, and how much each."""
        if self.test is None:
            return self.short()
        shares = [
            f"{name} {100 * effect.omega2:.0f} % ({_tested(effect, self.test.df)})"
            for name, effect in zip((*self.names, "their interaction"), self.test[:3])
            if effect is not None
        ]
        return (
            f"{self.short()} Of the variance over {self.n} trainings explain {', '.join(shares)}; "
            "the rest are the seeds."
        )

    def verdict(self, expected: Sequence[object]) -> str:
        """How this agrees with the papers' larger factor."""
        if self.test is None:
            return "not decided: too little has run"
        return agreement(self._ordered()[0] in expected, self.test.more < SURE)

    def table(self) -> tuple[list[str], list[list[object]]]:
        columns = ["", "sum of squares", "df", "F", "p", "p by permutation", "eta²", "omega²"]
        if self.test is None:
            return columns, []
        named = zip((*self.names, "interaction"), self.test[:3])
        rows: list[list[object]] = [
            [name, e.squares, e.df, e.f, e.p, e.permuted, e.eta2, e.omega2]
            for name, e in named
            if e is not None
        ]
        error = [self.test.error * self.test.df, self.test.df]
        return columns, [*rows, ["seeds (error)", *error, *[None] * 5]]

    def _ordered(self) -> tuple[str, str]:
        return self.names if self.test.a.omega2 >= self.test.b.omega2 else self.names[::-1]


Answer = Comparison | Factorial


def answers(sweep: Sweep) -> list[Answer]:
    """One answer per measure, where something was measured."""
    found: list[Answer] = []
    for measure in sorted(sweep.measures, key=lambda m: m != ACCURACY):
        if factorial(sweep):
            found.append(_factorial(sweep, measure))
        elif (best := compare(sweep, measure, held(sweep, measure))) is not None:
            found.append(best)
    return found


def by_held(sweep: Sweep, measure: Measure) -> list[Comparison]:
    """The comparison at each combination of what is held; none where nothing is, or of two axes."""
    names = _held_names(sweep)
    if not names or factorial(sweep):
        return []
    places = combinations({name: sweep.factors[name] for name in names})
    found = (compare(sweep, measure, at) for at in places)
    return [one for one in found if one is not None]


def cheapest(sweep: Sweep, measure: Measure) -> str:
    """Of all settings that are not surely worse than the best, that with the fewest evaluations."""
    if STEPS not in sweep.factors or (found := compare(sweep, measure, {})) is None:
        return ""
    if not found.over:
        return ""
    near = [found.best, *(pair.other for pair in found.pairs if not pair.sure)]
    calls = [np.mean([row[EVALUATIONS] for row in sweep.where(found.values[i])]) for i in near]
    least = int(np.argmin(calls))
    return (
        f"Not surely worse in {measure.name} than the best of all settings "
        f"({label(found.values[found.best])}), with the fewest evaluations: "
        f"{label(found.values[near[least]])}, {calls[least]:.3g} per picture."
    )


def no_signal(sweep: Sweep) -> bool:
    """Whether pictures were too wrong everywhere for differences to mean anything."""
    accuracies = [row[ACCURACY.key] for row in sweep.rows if row.get(ACCURACY.key) is not None]
    return bool(accuracies) and max(accuracies) < SIGNAL


def factorial(sweep: Sweep) -> bool:
    """Whether the question is which of two trained factors matters more."""
    return len(sweep.axes) == 2


def held(sweep: Sweep, measure: Measure) -> dict[str, Value]:
    """What is held, and where: as `at` says, or at the best mean over all that ran throughout."""
    asked, names = sweep.about.get("at") or {}, _held_names(sweep)
    own: dict[str, Value] = {name: OWN for name in names if asked.get(name) == OWN}
    said = {name: value(asked[name]) for name in names if name in asked and name not in own}
    free = combinations({name: sweep.factors[name] for name in names if name not in own})
    tried = [(c, _by_setting(sweep, measure, c)) for c in free if said.items() <= c.items()]
    tried = [(c, found) for c, found in tried if found]
    shared = set.intersection(*(set(found) for _, found in tried)) if tried else set()
    means = [np.mean([found[k] for k in shared or found]) for _, found in tried]
    return {**tried[measure.best(means)][0], **own} if tried else {}


def settled(sweep: Sweep, measure: Measure, values: Values, at: Values) -> Values:
    """`at` for these values: what each has its own of is where they are best."""
    fixed = {name: v for name, v in at.items() if v != OWN}
    own = combinations({name: sweep.factors[name] for name in at if name not in fixed})
    tried = [(c, _measured(sweep, measure, {**values, **fixed, **c})) for c in own]
    most = max((len(rows) for _, rows in tried), default=0)
    if not most:
        return fixed
    ran = [(c, rows) for c, rows in tried if len(rows) == most]
    means = [np.mean([row[measure.key] for row in rows]) for _, rows in ran]
    return {**fixed, **ran[measure.best(means)][0]}


def _held_names(sweep: Sweep) -> list[str]:
    asked = list(sweep.axes) or list(sweep.choices)[:1]
    return [name for name in sweep.factors if name not in asked]


def compare(sweep: Sweep, measure: Measure, at: Values) -> Comparison | None:
    """The values of all factors that are not held, beside each other; None: none was measured."""
    free = {name: values for name, values in sweep.factors.items() if name not in at}
    own = [{**c, **settled(sweep, measure, c, at)} for c in combinations(free)]
    rows = [({k: v for k, v in c.items() if at.get(k, OWN) == OWN}, c) for c in own]
    rows = [(shown, found) for shown, c in rows if (found := _measured(sweep, measure, c))]
    if not rows:
        return None
    values, cells = [c for c, _ in rows], [{row[SEED]: row for row in found} for _, found in rows]
    return comparison(measure, at, values, cells, by_captions=not sweep.axes)


def _factorial(sweep: Sweep, measure: Measure) -> Factorial:
    at, (a, b) = held(sweep, measure), sweep.axes
    rows = _measured(sweep, measure, at)
    sized = [row for row in rows if sweep.control not in (row[a], row[b])]
    try:
        test = two_way(*([row[key] for row in sized] for key in (measure.key, a, b)))
    except ValueError:
        test = None
    return Factorial(measure, at, (a, b), len(sized), test, _control(sweep, measure, at, rows))


def _control(sweep: Sweep, measure: Measure, at: Values, rows: list[Row]) -> Comparison | None:
    """The control beside sizes, paired by the other factor and the seed; None: there is no pair."""
    axis = next((axis for axis in sweep.axes if sweep.control in sweep.axes[axis]), None)
    if axis is None:
        return None
    other = next(name for name in sweep.axes if name != axis)
    cells = {v: {(r[other], r[SEED]): r for r in rows if r[axis] == v} for v in sweep.axes[axis]}
    paired = {v: own for v, own in cells.items() if own.keys() & cells[sweep.control].keys()}
    if len(paired) < 2 or not set.intersection(*map(set, paired.values())):
        return None
    values = [{axis: v} for v in paired]
    return comparison(measure, at, values, list(paired.values()), by_captions=False)


def _measured(sweep: Sweep, measure: Measure, values: Values) -> list[Row]:
    return [row for row in sweep.where(values) if row.get(measure.key) is not None]


def _by_setting(sweep: Sweep, measure: Measure, at: Values) -> dict[tuple, float]:
    """The outcomes at `at` but the control's, by all that is not held, and the seed."""
    free = [name for name in (*sweep.factors, SEED) if name not in at]
    rows = _measured(sweep, measure, at)
    sized = [row for row in rows if sweep.control not in [row[axis] for axis in sweep.axes]]
    return {tuple(row[name] for name in free): row[measure.key] for row in sized}


def _tested(effect: Effect, df: int) -> str:
    words = f"F({effect.df}, {df}) = {effect.f:.3g}, {p_text(effect.p)}"
    if effect.permuted is None:
        return words
    return f"{words}, by permutation {p_text(effect.permuted)}"
