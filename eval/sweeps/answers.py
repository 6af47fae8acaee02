"""Answers of a sweep: sentences with the statistical test that each is based on.

A sweep asks about its trained axes, or about its first choice if it has no axes. With two axes, the
question is which one explains more of a measure's variance. Otherwise the best value is compared
with every other one, under the same captions and noise. All other choices, such as the guidance
scale, are held where they are best on average over all values that ran, which favours none. A sweep
can override this with `at`: hold a choice at a value, or where each compared value is best ("own").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.eval.metrics.measures import ACCURACY, Measure
from cascade.eval.pages.report import text
from cascade.eval.sweeps.comparison import OWN, Comparison, agreement, comparison, label, where
from cascade.eval.sweeps.folder import EVALUATIONS, SEED, STEPS
from cascade.eval.sweeps.results import Cell, Sweep, Value, Values, as_value, combinations
from cascade.eval.sweeps.significance import SIGNIFICANT, Effect, TwoWay, p_text, two_way

SIGNAL = 0.3  # nothing is concluded if even the best cell has a lower scene accuracy


@dataclass(frozen=True)
class Factorial:
    """Analysis of variance of two trained factors, called `names`.

    `test` is None if too little has run; `control` compares the control with its factor's sizes.
    """

    measure: Measure
    at: Values
    names: tuple[str, str]
    n: int
    test: TwoWay | None
    control: Comparison | None = None

    def short(self) -> str:
        """State which factor explains more, and whether that is significant."""
        head = f"{self.measure.title}{where(self.at)}:"
        if self.test is None:
            return f"{head} too little has run to compare the factors."
        matter = [n for n, effect in zip(self.names, self.test[:2]) if effect.p < SIGNIFICANT]
        equal = f"{p_text(self.test.more)} for equal effects"
        if self.test.more < SIGNIFICANT:
            one, other = self._ordered()
            return f"{head} {one} explains significantly more than {other} ({equal})."
        if not matter:
            return f"{head} neither {' nor '.join(self.names)} has a significant effect."
        effects = "have significant effects" if len(matter) > 1 else "has a significant effect"
        undecided = f"which explains more is undecided ({equal}; so far {self._ordered()[0]})"
        return f"{head} {' and '.join(matter)} {effects}; {undecided}."

    def sentence(self) -> str:
        """State which factor explains more, and the share of each."""
        if self.test is None:
            return self.short()
        shares = [
            f"{name} {100 * effect.omega2:.0f} % ({_tested(effect, self.test.df)})"
            for name, effect in zip((*self.names, "their interaction"), self.test[:3])
            if effect is not None
        ]
        return (
            f"{self.short()} Shares of the variance over {self.n} trainings: {', '.join(shares)}; "
            "the rest is due to the seeds."
        )

    def verdict(self, expected: Sequence[object]) -> str:
        """State whether this agrees with the factor that the papers found larger."""
        if self.test is None:
            return "undecided: too little has run"
        return agreement(self._ordered()[0] in expected, self.test.more < SIGNIFICANT)

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
    """Return one answer for each measure that has values, accuracy first."""
    found: list[Answer] = []
    for measure in sorted(sweep.measures, key=lambda m: m != ACCURACY):
        if factorial(sweep):
            found.append(_factorial(sweep, measure))
        elif (best := compare(sweep, measure, held(sweep, measure))) is not None:
            found.append(best)
    return found


def by_held(sweep: Sweep, measure: Measure) -> list[Comparison]:
    """Return the comparison at every combination of the held choices; none for two axes."""
    names = _held_names(sweep)
    if not names or factorial(sweep):
        return []
    places = combinations({name: sweep.factors[name] for name in names})
    found = (compare(sweep, measure, at) for at in places)
    return [one for one in found if one is not None]


def cheapest(sweep: Sweep, measure: Measure) -> str:
    """State the cheapest setting that is not significantly worse than the best."""
    if STEPS not in sweep.factors or (found := compare(sweep, measure, {})) is None:
        return ""
    if not found.over:
        return ""
    near = [found.best, *(pair.other for pair in found.pairs if not pair.significant)]
    calls = [np.mean([row[EVALUATIONS] for row in sweep.where(found.values[i])]) for i in near]
    least = int(np.argmin(calls))
    return (
        f"The cheapest setting whose {measure.name} is not significantly worse than that of the "
        f"best ({label(found.values[found.best])}): {label(found.values[near[least]])}, "
        f"{calls[least]:.3g} evaluations per picture."
    )


def found(sweep: Sweep) -> list[str]:
    """Return what the sweep found, a few sentences per measure."""
    if not sweep.rows:
        return ["not run."]
    if no_signal(sweep):
        best = max(sweep.numbers(ACCURACY.key))
        return [f"no signal: the best cell's scene accuracy is {text(best)}, below {SIGNAL:g}."]
    lines = []
    for answer in answers(sweep):
        lines.append(answer.sentence())
        if isinstance(answer, Factorial) and answer.control:
            lines.append(answer.control.control_sentence(sweep.control))
        if extra := cheapest(sweep, answer.measure):
            lines.append(extra)
    return lines


def short(sweep: Sweep) -> str:
    """Return what the sweep found by its first measure, in one sentence."""
    if not sweep.rows or no_signal(sweep):
        return found(sweep)[0]
    return answers(sweep)[0].short()


def no_signal(sweep: Sweep) -> bool:
    """Return whether all accuracies are too low for differences to mean anything."""
    accuracies = sweep.numbers(ACCURACY.key)
    return bool(accuracies) and max(accuracies) < SIGNAL


def factorial(sweep: Sweep) -> bool:
    """Return whether the question is which of two trained factors matters more."""
    return len(sweep.axes) == 2


def held(sweep: Sweep, measure: Measure) -> dict[str, Value]:
    """Return the held choices and their values: those in `at`, or those with the best mean.

    The mean is over the settings that ran at every candidate, so that the candidates compare.
    """
    asked, names = sweep.about.get("at") or {}, _held_names(sweep)
    own: dict[str, Value] = {name: OWN for name in names if asked.get(name) == OWN}
    given = {name: as_value(asked[name]) for name in names if name in asked and name not in own}
    free = combinations({name: sweep.factors[name] for name in names if name not in own})
    tried = [(c, _by_setting(sweep, measure, c)) for c in free if given.items() <= c.items()]
    tried = [(c, found) for c, found in tried if found]
    shared = set.intersection(*(set(found) for _, found in tried)) if tried else set()
    means = [np.mean([found[k] for k in shared or found]) for _, found in tried]
    return {**tried[measure.best(means)][0], **own} if tried else {}


def settled(sweep: Sweep, measure: Measure, values: Values, at: Values) -> Values:
    """Return `at` with every "own" replaced by the value at which these values are best."""
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
    """Compare the values of all factors that are not held; None if none was measured."""
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


def _control(sweep: Sweep, measure: Measure, at: Values, rows: list[Cell]) -> Comparison | None:
    """Compare control and sizes, paired by the other factor and seed; None if no pair exists."""
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


def _measured(sweep: Sweep, measure: Measure, values: Values) -> list[Cell]:
    return [row for row in sweep.where(values) if row.get(measure.key) is not None]


def _by_setting(sweep: Sweep, measure: Measure, at: Values) -> dict[tuple, float]:
    """Return the values at `at`, without the control's, by all other factors and the seed."""
    free = [name for name in (*sweep.factors, SEED) if name not in at]
    rows = _measured(sweep, measure, at)
    sized = [row for row in rows if sweep.control not in [row[axis] for axis in sweep.axes]]
    return {tuple(row[name] for name in free): row[measure.key] for row in sized}


def _tested(effect: Effect, df: int) -> str:
    words = f"F({effect.df}, {df}) = {effect.f:.3g}, {p_text(effect.p)}"
    if effect.permuted is None:
        return words
    return f"{words}, by permutation {p_text(effect.permuted)}"
