"""How figures look: the same on a white page and on a dark one, to the colour-blind, and in print.

Grounds are transparent; colours have a contrast of 3 and more to both grounds, and each curve has a
marker of its own beside its colour. Every mean has a band or a bar from the lowest to the highest
of the seeds.
"""

import csv
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, Locator
from matplotlib.transforms import Bbox

from cascade.errors import UserError
from cascade.eval.ablation import TINY, Distance, Spread
from cascade.files import write_atomically

GREY = "#80868f"  # of lines and letters
PALETTE = ("#4499cc", "#dd7700", "#5544ff", "#aa4455")
_MARKERS = "osD^vPX*"
_ENDS = "low", "high"
PANEL = 4.8, 3.9  # inches


@dataclass(frozen=True)
class Curve:
    """Means with extremes, in x and in y.

    Args:
        style: its place among the curves; None: the control's, grey and dotted.
        notes: what stands beside each point.
    """

    name: str
    x: Sequence[Spread]
    y: Sequence[Spread]
    style: int | None
    notes: Sequence[str] = ()

    @property
    def look(self) -> dict[str, object]:
        if self.style is None:
            return {"color": GREY, "marker": "o", "linestyle": ":"}
        return {
            "color": PALETTE[self.style % len(PALETTE)],
            "marker": _MARKERS[self.style % len(_MARKERS)],
            "linestyle": "-" if self.style < len(PALETTE) else "--",
        }


class Ratios(Locator):
    """An axis on which equal ratios of a distance have equal lengths, and its marks."""

    def __init__(self, distance: Distance):
        self.distance = distance
        self.sign = 1 if distance(1.0) > distance(0.0) else -1

    def set(self, axes: Axes, name: str) -> None:
        """Makes it axis "x" or "y"."""
        ways = self.place, lambda t: self.distance(np.exp(self.sign * t))
        getattr(axes, f"set_{name}scale")("function", functions=ways)
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(self)
        axis.set_major_formatter(lambda x, _: f"{x:g}")

    def place(self, x: Any) -> Any:
        return self.sign * np.log(np.maximum(self.distance(x), TINY))

    def __call__(self) -> Sequence[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Round distances, as few as are enough."""
        low, high = sorted(float(self.distance(v)) for v in (vmin, vmax))
        powers = range(math.floor(math.log10(max(low, TINY))), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), np.arange(1, 10, 0.5)):
            marks = [step * 10.0**power for power in powers for step in steps]
            inside = [mark for mark in marks if low <= mark <= high]
            if len(inside) > 2:
                break
        return [round(float(self.distance(mark)), 12) for mark in inside]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it is called, what its axes are, and who draws into it.

    Args:
        x, y: distances whose ratios the axes show; None: it shows differences.
    """

    title: str
    xlabel: str
    ylabel: str
    draw: Callable[[Axes], None]
    x: Distance | None = None
    y: Distance | None = None


def alike(panels: Sequence[Panel]) -> list[Panel]:
    """The same panels over the same range, so that they compare."""

    def draw(axes: Axes, own: Panel) -> None:
        own.draw(axes)
        limits = [axes.dataLim]
        for panel in panels:
            other = Figure().add_subplot()
            panel.draw(other)
            limits.append(other.dataLim)
        axes.dataLim.set(Bbox.union(limits))
        axes.autoscale_view()

    return [replace(panel, draw=partial(draw, own=panel)) for panel in panels]


def plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of one pair of axes."""
    figure = Figure(figsize=(6.4, 4), facecolor="none", layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    _dress(axes, xlabel, ylabel)
    return figure, axes


def compose(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """Panels in rows of so many."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = PANEL[0] * columns, PANEL[1] * rows
    figure = Figure(figsize=size, facecolor="none", layout="constrained")
    for panel, part in zip(panels, figure.subfigures(rows, columns, squeeze=False).flat):
        part.set_facecolor("none")
        axes = part.add_subplot(facecolor="none")
        _dress(axes, panel.xlabel, panel.ylabel)
        for name, distance in (("x", panel.x), ("y", panel.y)):
            if distance:
                Ratios(distance).set(axes, name)
        panel.draw(axes)
        axes.set_title(panel.title, loc="left", color=GREY, fontsize=10, fontweight="bold")
        names = dict(zip(*reversed(axes.get_legend_handles_labels())))
        if names:
            _legend(part, names)
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.svg and STEM.png; the same figure gives the same files."""
    with matplotlib.rc_context({"svg.hashsalt": "cascade"}):
        for ending, about in ((".svg", {"Date": None}), (".png", {})):
            path = stem.with_name(stem.name + ending)
            write_atomically(
                path,
                lambda beside, kind=ending[1:], about=about: figure.savefig(
                    beside, format=kind, dpi=160, facecolor="none", metadata=about
                ),
            )


def tradeoff(curves: Sequence[Curve]) -> Callable[[Axes], None]:
    """Curves in the plane of two outcomes; the band is what a box of extremes sweeps over."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            boxes = [
                [(x, y) for x in (p.low, p.high) for y in (q.low, q.high)]
                for p, q in zip(curve.x, curve.y)
            ]
            swept = [_hull([*a, *b]) for a, b in itertools.pairwise(boxes)]
            if outlines := [Outline(points, closed=True) for points in swept if len(points) > 3]:
                band = Outline.make_compound_path(*outlines)
                axes.add_patch(
                    PathPatch(band, facecolor=curve.look["color"], alpha=0.18, linewidth=0)
                )
            _line(axes, curve)
        axes.margins(0.1)

    return draw


def against(curves: Sequence[Curve], ticks: Sequence[float] = ()) -> Callable[[Axes], None]:
    """Curves over numbers; `ticks`: those to name below, where there is room (none: the axis')."""
    named: list[float] = []
    for tick in sorted(ticks):
        if not named or tick - named[-1] >= 0.06 * (max(ticks) - min(ticks)):
            named.append(tick)

    def draw(axes: Axes) -> None:
        for curve in curves:
            low, high = ([getattr(s, end) for s in curve.y] for end in _ENDS)
            axes.fill_between(
                _means(curve.x), low, high, color=curve.look["color"], alpha=0.18, linewidth=0
            )
            _line(axes, curve)
        if named:
            axes.xaxis.set_major_locator(FixedLocator(named))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.margins(0.08)

    return draw


def dots(curves: Sequence[Curve], names: Sequence[str]) -> Callable[[Axes], None]:
    """Dots with bars over categories, the first on top; a curve's y are places among `names`."""

    def draw(axes: Axes) -> None:
        for i, curve in enumerate(curves):
            shift = 0.5 * ((i + 0.5) / len(curves) - 0.5)
            places = [s.mean + shift for s in curve.y]
            look = {**curve.look, "linestyle": "none"}
            low, high = ([getattr(s, end) for s in curve.x] for end in _ENDS)
            axes.hlines(places, low, high, look["color"], linewidth=2)
            axes.plot(_means(curve.x), places, label=curve.name, markersize=6, **look)
        axes.set_yticks(
            range(len(names)), [textwrap.fill(name.replace("_", " "), 16) for name in names]
        )
        axes.set_ylim(len(names) - 0.4, -0.6)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.08)

    return draw


def training(runs: Sequence[tuple[Curve, Sequence[int], Sequence[float]]]) -> Callable:
    """Thin lines of loss over images seen; a curve lends its name and look to all its runs."""

    def draw(axes: Axes) -> None:
        for curve, images, losses in runs:
            look = {**curve.look, "marker": "none"}
            axes.plot(images, losses, linewidth=0.9, alpha=0.8, label=curve.name, **look)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")

    return draw


def loss_columns(path: Path) -> list[tuple[str, list[int], list[float]]]:
    """(name, images, values) of every loss in a metrics.csv; a row holds only what was logged then.

    Raises UserError where the file is missing or has no loss in it.
    """
    if not path.is_file():
        raise UserError(f"no losses at {path}: name the metrics.csv of a training run")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = []
    for name in [name for name in (rows[0] if rows else []) if "loss" in name]:
        logged = [(int(row["images"]), float(row[name])) for row in rows if row[name]]
        if logged:
            columns.append((name, *map(list, zip(*logged))))
    if not columns:
        raise UserError(f"{path} has no column with a loss: name the metrics.csv of a training run")
    return columns


def _means(spreads: Sequence[Spread]) -> list[float]:
    return [s.mean for s in spreads]


def _line(axes: Axes, curve: Curve) -> None:
    x, y = _means(curve.x), _means(curve.y)
    axes.plot(x, y, label=curve.name, linewidth=1.6, markersize=4.5, **curve.look)
    for *point, note in zip(x, y, curve.notes):
        axes.annotate(
            note,
            point,
            (4, -3),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
            color=curve.look["color"],
        )


def _dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=GREY)
    axes.set_ylabel(ylabel, color=GREY)
    axes.tick_params(which="both", colors=GREY)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def _legend(part: SubFigure, names: Mapping[str, Artist]) -> None:
    longest = max(map(len, names))
    part.legend(
        names.values(),
        names.keys(),
        frameon=False,
        labelcolor=GREY,
        fontsize=8.5,
        loc="outside lower center",
        ncols=max(1, min(len(names), 4, 60 // (longest + 6))),
    )


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The convex hull, closed, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(set(points))
    hull: list[tuple[float, float]] = []
    for walk in (ordered, ordered[::-1]):
        start = len(hull)
        for x, y in walk:
            while len(hull) > start + 1:
                (ax, ay), (bx, by) = hull[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                hull.pop()
            hull.append((x, y))
        hull.pop()
    return [*hull, *hull[:1]]
