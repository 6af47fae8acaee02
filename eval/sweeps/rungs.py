"""Successive halving by intervals: points that are worse beyond doubt are trained no further.

At each of the sweep's `rungs`, a share of the images, every remaining point is measured. A setting
is cut if, by the measure, the best end of its interval is worse than the worst end of the best
setting's. An interval is of the cell at which a point is best; that of a setting spans the points
of all seeds. (Jamieson and Talwalkar 2016, who cut the worse half by means.)
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cascade.errors import UserError
from cascade.eval.metrics.interval import Interval, of_share
from cascade.eval.metrics.measures import ACCURACY, MEASURES, SWEEPS, Measure
from cascade.eval.sweeps.folder import Point
from cascade.files.atomic import write_text

RUNGS = "rungs.json"  # in a sweep's folder: what was decided at each rung, in order


class Cut(NamedTuple):
    """Why a setting is trained no further."""

    share: float
    measure: str
    interval: Interval
    best: str
    best_interval: Interval


def measure_named(key: str) -> Measure:
    """Raises UserError if sweeps have no such measure."""
    found = {m.key: m for m in MEASURES if SWEEPS in m.places}
    if key not in found:
        raise UserError(f"rung_measure={key}: choose one of {', '.join(found)}")
    return found[key]


def decided(root: Path) -> list[dict[str, Any]]:
    """What was decided so far: at each rung its `share`, and what was `cut`, by setting."""
    path = root / RUNGS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove it, and points are compared again") from error


def all_cut(root: Path) -> dict[str, Cut]:
    """Every setting that was cut, and why."""
    rows = [row for rung in decided(root) for row in rung["cut"].items()]
    return {name: Cut(a, b, tuple(own), c, tuple(best)) for name, (a, b, own, c, best) in rows}


def decide(
    root: Path,
    share: float,
    measure: Measure,
    points: Mapping[str, Sequence[Path]],
    kept: Collection[str],
) -> dict[str, Cut]:
    """Compare the settings that remain, and write down which are cut.

    Args:
        points: the folders of each setting's points, one for each seed.
        kept: the settings that serve as controls, which are never cut.

    Raises:
        UserError: a point's cells lack the measure, or its interval.
    """
    found = {name: _interval(measure, folders) for name, folders in points.items()}
    sign = -1 if measure.less else 1
    worst = {name: min(sign * end for end in ends) for name, ends in found.items()}
    best = max(worst, key=worst.get)
    cut = {
        name: Cut(share, measure.key, ends, best, found[best])
        for name, ends in found.items()
        if name not in kept and max(sign * end for end in ends) < worst[best]
    }
    rung = {"share": share, "cut": {name: list(why) for name, why in cut.items()}}
    write_text(root / RUNGS, json.dumps([*decided(root), rung], indent=1) + "\n")
    return cut


def _interval(measure: Measure, folders: Sequence[Path]) -> Interval:
    """The range of the intervals of a setting's points, each at its own best cell."""
    ends: list[float] = []
    for folder in folders:
        rows = [row for row in Point(folder).cells() if row.get(measure.key) is not None]
        if not rows:
            raise UserError(f"{folder} has no {measure.name}: choose another rung_measure")
        ends += _of_cell(measure, rows[measure.best([row[measure.key] for row in rows])], folder)
    return min(ends), max(ends)


def _of_cell(measure: Measure, row: Mapping[str, Any], folder: Path) -> Interval:
    if ends := (row.get("intervals") or {}).get(measure.key):
        return ends[0], ends[1]
    kinds = [row[kind]["count"] for kind in ("one", "two") if kind in row]
    if measure != ACCURACY or not kinds:
        raise UserError(f"{folder}: {measure.name} has no interval: choose another rung_measure")
    return of_share(row[measure.key], sum(kinds))


def said(name: str, why: Cut) -> str:
    """A sentence for the report."""
    own, best = ("{:.3g} to {:.3g}".format(*ends) for ends in (why.interval, why.best_interval))
    what = measure_named(why.measure).name
    return (
        f"{name} was cut after {why.share:.0%} of the images: its {what} is {own}, and that of "
        f"{why.best} is {best} there (95 % intervals over all seeds, each point at its own best "
        "choices)."
    )
