"""The figures of a sweep.

For two trained factors and a choice: Fréchet distance against CLIP score along that choice, in two
panels, with one curve per value of each factor, as in Imagen (2205.11487, figure 4). Otherwise: one
panel per measure, along the factor that the sweep names in `along`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.eval.metrics.measures import ACCURACY, CLIP_SCORE, FRECHET, Measure
from cascade.eval.pages.curves import Curve, against, dots, loss_columns, tradeoff, training
from cascade.eval.pages.plots import Panel, alike, compose, save
from cascade.eval.pages.spread import Distance, Spread, spread
from cascade.eval.sweeps.answers import factorial
from cascade.eval.sweeps.comparison import label
from cascade.eval.sweeps.folder import EVALUATIONS, SEED, STEPS, Point
from cascade.eval.sweeps.results import Sweep, Value, Values, combinations, shown

WIDE = 4  # ratio of distances from which an axis shows ratios
_NAMES = {"scale": "guidance scale", EVALUATIONS: "network evaluations per picture"}
_BANDS = "Points are means over seeds; bands and bars span the range over seeds."


@dataclass(frozen=True)
class Drawing:
    """Panels that belong together, and their caption."""

    name: str
    panels: Sequence[Panel]
    caption: str


def drawings(sweep: Sweep) -> list[Drawing]:
    """Return the figures of the measures, the one that answers the question first."""
    if not sweep.rows:
        return []
    if factorial(sweep) and sweep.x in sweep.choices:
        drawn = [_factors(sweep, None, FRECHET), _factors(sweep, sweep.x, ACCURACY)]
        return [drawing for drawing in drawn if drawing]
    groups = combinations({n: v for n, v in sweep.factors.items() if n != sweep.x})
    panels = [_panel(sweep, measure, groups) for measure in sweep.measures]
    drawn = [Drawing("measures", panels, f"{_who(sweep)} {_BANDS}")]
    numbers = sweep.x and len(sweep.ran(sweep.x)) > 1 and _numeric(sweep, sweep.x)
    if numbers and {FRECHET, CLIP_SCORE} <= set(sweep.measures):
        curves = [_tradeoff(sweep, values, [{}], i) for i, values in enumerate(groups)]
        ratios = [_ratios(sweep, measure) for measure in (CLIP_SCORE, FRECHET)]
        draw = tradeoff([c for c in curves if c.x])
        panel = Panel("", CLIP_SCORE.name, FRECHET.name, draw, *ratios)
        words = f"Labels: {axis_name(sweep.x)}. {_who(sweep)} {_BANDS}"
        drawn.append(Drawing("tradeoff", [panel], words))
    return drawn


def curves_of_training(sweep: Sweep) -> Drawing | None:
    """Return the losses of all runs over images seen, one panel per value of the first axis."""
    if sweep.folder is None or not sweep.axes:
        return None
    first, *others = sweep.axes
    groups = combinations({name: sweep.axes[name] for name in others})
    runs: dict[Value, list] = {v: [] for v in sweep.axes[first]}
    for name, values, _ in sweep.points():
        own = {axis: values[axis] for axis in others}
        look = Curve(label(own), (), (), groups.index(own))
        for path in Point(sweep.folder / name).losses:
            _, images, losses = loss_columns(path)[0]
            runs[values[first]].append((look, images, losses))
    panels = [
        Panel(label({first: v}), "images seen", "loss", training(of))
        for v, of in runs.items()
        if of
    ]
    words = "Training loss of every run; the seeds of a setting share a colour."
    return Drawing("training", panels, words) if panels else None


def named(sweep: Sweep) -> list[tuple[str, Drawing]]:
    """Return the figures with the names of their files, NAME, NAME_tradeoff and so on."""
    drawn = drawings(sweep)
    return [(f"{sweep.name}_{d.name}" if i else sweep.name, d) for i, d in enumerate(drawn)]


def save_drawings(sweep: Sweep, folder: Path) -> None:
    """Write every figure as SVG and as PNG."""
    for name, drawing in named(sweep):
        save(compose(drawing.panels), folder / name)


def axis_name(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def _factors(sweep: Sweep, x: str | None, y: Measure) -> Drawing | None:
    """Return one panel per trained factor, averaged over the sizes of the other.

    Args:
        x: the choice on the x axis; None: the CLIP score, with the choice as labels of the points.
    """
    if not {y, CLIP_SCORE} <= set(sweep.measures):
        return None
    panels, drawn = [], 0
    for axis, other in zip(sweep.axes, reversed(sweep.axes)):
        over = _common(sweep, axis, other)
        sizes = [v for v in sweep.axes[axis] if v != sweep.control]
        curves = []
        for v in sweep.ran(axis):
            style = sizes.index(v) if v in sizes else None
            if x is None:
                curves.append(_tradeoff(sweep, {axis: v}, over, style))
            else:
                curves.append(_curve(sweep, {axis: v}, over, y, style))
        curves = [curve for curve in curves if curve.x]
        drawn += len(curves)
        mean = ", ".join(label(values) for values in over)
        mean = f"mean over {mean}" if len(over) > 1 else mean or "too little has run"
        draw = tradeoff(curves) if x is None else against(curves, _ticks(sweep, x))
        head, across = f"by {axis_name(axis)}\n{mean}", axis_name(x) if x else CLIP_SCORE.name
        ratios = None if x else _ratios(sweep, CLIP_SCORE)
        panels.append(Panel(head, across, y.name, draw, ratios, _ratios(sweep, y)))
    if not drawn:
        return None
    at = f"Labels: {axis_name(sweep.x)}. " if x is None else ""
    name = "factors" if x is None else y.key
    return Drawing(name, alike(panels), f"{at}{_who(sweep)} {_BANDS}")


def _common(sweep: Sweep, axis: str, other: str) -> list[Values]:
    """Return the sizes of the other factor that ran with every value of this one."""
    sizes = [v for v in sweep.ran(other) if v != sweep.control]
    ran = sweep.ran(axis)
    return [{other: v} for v in sizes if all(sweep.where({axis: a, other: v}) for a in ran)]


def _panel(sweep: Sweep, measure: Measure, groups: Sequence[Values]) -> Panel:
    better = "less" if measure.less else "more"
    name, outcome = f"{measure.title} ({better} is better)", measure.name
    curves = [_curve(sweep, values, [{}], measure, i) for i, values in enumerate(groups)]
    curves = [curve for curve in curves if curve.x]
    ratios = _ratios(sweep, measure)
    if sweep.x == STEPS:
        return Panel(name, axis_name(EVALUATIONS), outcome, against(curves), lambda n: n, ratios)
    if sweep.x and _numeric(sweep, sweep.x):
        draw = against(curves, _ticks(sweep, sweep.x))
        return Panel(name, axis_name(sweep.x), outcome, draw, y=ratios)
    names = [shown(v) for v in sweep.ran(sweep.x)] if sweep.x else [""]
    # Categories are listed on the y axis, where their names have room.
    swapped = [Curve(c.name, c.y, c.x, c.style) for c in curves]
    return Panel(name, outcome, axis_name(sweep.x or ""), dots(swapped, names), ratios)


def _ratios(sweep: Sweep, measure: Measure) -> Distance | None:
    """Return the measure's distance if the cells span such a range that ratios suit them."""
    if measure.distance is None:
        return None
    found = [measure.distance(value) for value in sweep.numbers(measure.key)]
    return measure.distance if found and max(found) > WIDE * min(found) > 0 else None


def _curve(
    sweep: Sweep, values: Values, over: Sequence[Values], measure: Measure, style: int | None
) -> Curve:
    """Return a measure along the sweep's x: numbers, evaluations, or indices of categories."""
    xs, ys = [], []
    for place, v in enumerate(sweep.ran(sweep.x) if sweep.x else [""]):
        at = {**values, sweep.x: v} if sweep.x else values
        y = _spread(sweep, at, over, measure.key)
        if y is None:
            continue
        if sweep.x == STEPS:
            xs.append(_spread(sweep, at, over, EVALUATIONS))
        else:
            xs.append(spread([v if sweep.x and _numeric(sweep, sweep.x) else place]))
        ys.append(y)
    return Curve(label(values), xs, ys, style)


def _tradeoff(sweep: Sweep, values: Values, over: Sequence[Values], style: int | None) -> Curve:
    xs, ys, notes = [], [], []
    for v in sweep.ran(sweep.x):
        at = {**values, sweep.x: v}
        x, y = (_spread(sweep, at, over, m.key) for m in (CLIP_SCORE, FRECHET))
        if x and y:
            xs.append(x)
            ys.append(y)
            notes.append(shown(v))
    return Curve(label(values), xs, ys, style, notes)


def _spread(sweep: Sweep, at: Values, over: Sequence[Values], key: str) -> Spread | None:
    """Return the spread over seeds of the mean over `over`; seeds with gaps are left out."""
    seeds: dict[int, list[float]] = {}
    for values in over:
        for row in sweep.where({**at, **values}):
            if row.get(key) is not None:
                seeds.setdefault(row[SEED], []).append(row[key])
    means = [float(np.mean(found)) for found in seeds.values() if len(found) == len(over)]
    return spread(means) if means else None


def _numeric(sweep: Sweep, factor: str) -> bool:
    return all(isinstance(v, float) for v in sweep.factors[factor])


def _ticks(sweep: Sweep, x: str) -> list[float]:
    return [v for v in sweep.factors[x] if isinstance(v, float)]


def _who(sweep: Sweep) -> str:
    counts = sorted({int(row["count"]) for row in sweep.rows})
    features = f"; feature space: {sweep.about['features']}" if sweep.about.get("features") else ""
    seeds = ", ".join(map(str, sweep.seeds))
    return f"{', '.join(map(str, counts))} captions, seeds {seeds}{features}."
