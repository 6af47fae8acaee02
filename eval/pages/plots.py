"""Figures that are legible on light and dark pages, in print, and to colour-blind readers.

Backgrounds are transparent. Colours have a contrast of at least 3 to both backgrounds, and every
curve has its own marker as well (`curves`).
"""

import math
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
from matplotlib.ticker import Locator
from matplotlib.transforms import Bbox

from cascade.eval.pages.spread import TINY, Distance
from cascade.files.atomic import write_atomically

GREY = "#80868f"  # of lines and text
PALETTE = ("#4499cc", "#dd7700", "#5544ff", "#aa4455")
PANEL = 4.8, 3.9  # inches


class Ratios(Locator):
    """An axis scale and its ticks, on which equal ratios of a distance have equal lengths."""

    def __init__(self, distance: Distance):
        self.distance = distance
        self.sign = 1 if distance(1.0) > distance(0.0) else -1

    def set(self, axes: Axes, name: str) -> None:
        """Apply to the axis called "x" or "y"."""
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
        """Return ticks at round distances: the coarsest steps that give more than two."""
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
    """One pair of axes: its title, labels and the function that draws into it.

    Args:
        x, y: distances whose ratios the axis shows; None: a linear axis.
    """

    title: str
    xlabel: str
    ylabel: str
    draw: Callable[[Axes], None]
    x: Distance | None = None
    y: Distance | None = None


def alike(panels: Sequence[Panel]) -> list[Panel]:
    """Give panels the same ranges, so that they can be compared."""

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
    """Create a figure with one pair of axes."""
    figure = Figure(figsize=(6.4, 4), facecolor="none", layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    _dress(axes, xlabel, ylabel)
    return figure, axes


def compose(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """Arrange panels in rows of at most `columns`."""
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
    """Write STEM.svg and STEM.png; the same figure gives identical files."""
    with matplotlib.rc_context({"svg.hashsalt": "cascade"}):
        for ending, about in ((".svg", {"Date": None}), (".png", {})):
            path = stem.with_name(stem.name + ending)
            write_atomically(
                path,
                lambda path, kind=ending[1:], about=about: figure.savefig(
                    path, format=kind, dpi=160, facecolor="none", metadata=about
                ),
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
