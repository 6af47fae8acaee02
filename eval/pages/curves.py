"""Content of figures: curves and dots with the range over seeds, and training losses."""

import csv
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator

from cascade.errors import UserError
from cascade.eval.pages.plots import GREY, PALETTE
from cascade.eval.pages.spread import Spread

_MARKERS = "osD^vPX*"
_ENDS = "low", "high"


@dataclass(frozen=True)
class Curve:
    """A curve through means, with their extremes in x and in y.

    Args:
        style: index that selects colour and marker; None: the control's style, grey and dotted.
        notes: a label for each point.
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


def tradeoff(curves: Sequence[Curve]) -> Callable[[Axes], None]:
    """Draw curves in the plane of two measures; bands are swept by the boxes of extremes."""

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
    """Draw curves over numbers; label `ticks` where there is room (none: default ticks)."""
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
    """Draw dots with bars over categories, the first on top; a curve's y index `names`."""

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
    """Draw losses over images seen; every run takes name and colour from its curve."""

    def draw(axes: Axes) -> None:
        for curve, images, losses in runs:
            look = {**curve.look, "marker": "none"}
            axes.plot(images, losses, linewidth=0.9, alpha=0.8, label=curve.name, **look)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")

    return draw


def loss_columns(path: Path) -> list[tuple[str, list[int], list[float]]]:
    """Return (name, images, values) of every loss in a metrics.csv, whose rows may have gaps.

    Raises:
        UserError: the file is missing or has no loss.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the metrics.csv of a training run")
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
    style = {"va": "top", "fontsize": 7.5, "color": curve.look["color"]}
    for *point, note in zip(x, y, curve.notes):
        axes.annotate(note, point, (4, -3), textcoords="offset points", **style)


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the closed convex hull, counter-clockwise (Andrew's monotone chain)."""
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
