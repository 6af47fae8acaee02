"""What a sweep measured: cells read from its folder, or from the CSV that was made of them.

A row is one measured cell, flat: values of the axes (trained) and choices (of sampling) by name,
`seed`, what was measured, and "cost.*" and "protocol.*". Values that read as numbers are numbers:
"2", 2 and 2.0 are one. What was asked and is not there is not run, and says so.
"""

import contextlib
import csv
import itertools
import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade.errors import UserError
from cascade.texts import lines

Value = str | float
Values = Mapping[str, Value]
Row = Mapping[str, Any]
Distance = Callable[[Any], Any]  # from a value, and back by the same

ABOUT, CELLS, COST, SEED = "sweep.json", "cells.jsonl", "cost.json", "seed"
STEPS, EVALUATIONS = "steps", "evaluations"
TINY = 1e-9  # a distance; less is none


class Measure(NamedTuple):
    """A column with an outcome.

    Args:
        less: whether less of it is better.
        distance: from it to what two cells are compared by as a ratio, since its errors grow with
            it; None: they are compared by their difference.
    """

    key: str
    name: str
    less: bool = False
    distance: Distance | None = None

    def best(self, values: Sequence[float | int]) -> int:
        return int(np.argmin(values) if self.less else np.argmax(values))


FRECHET = Measure("frechet", "Fréchet distance", less=True, distance=lambda x: x)
CLIP_SCORE = Measure("clip_score", "CLIP score", distance=lambda x: 1 - x)
ACCURACY = Measure("accuracy", "scene accuracy")
MEASURES = (FRECHET, CLIP_SCORE, ACCURACY)
PROTOCOL, INTERVALS = "protocol.", "intervals."
JUDGES_WEIGHTS = "judge's weights"
_ALIKE = ("judge", "split", "reference", "features", "captions of each kind")  # of all cells


class Spread(NamedTuple):
    """A mean over seeds, their standard deviation (None: one seed), and their extremes."""

    mean: float
    deviation: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Sweep:
    """What was asked (`about`, the content of sweep.json) and what was measured (`rows`).

    Args:
        axes, choices: the values of each factor, in order.
        folder: where its grids and curves lie; None: only rows are left.
        stale: cells left out because no value that is asked for is theirs.
    """

    about: Mapping[str, Any]
    axes: Mapping[str, tuple[Value, ...]]
    choices: Mapping[str, tuple[Value, ...]]
    rows: tuple[Row, ...]
    folder: Path | None = None
    stale: int = 0

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def place(self) -> str:
        """The name of its folder, of which no other sweep beside it has the same."""
        return self.folder.resolve().name if self.folder else self.name

    @property
    def factors(self) -> dict[str, tuple[Value, ...]]:
        return {**self.axes, **self.choices}

    @property
    def x(self) -> str | None:
        """The factor along which curves are drawn; None: there are only seeds."""
        return self.about.get("along") or next(reversed(self.factors), None)

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.about["seeds"]]

    @property
    def control(self) -> Value | None:
        """The value that is listed apart and is no size."""
        return None if self.about.get("control") is None else value(self.about["control"])

    def expected(self, measure: Measure) -> list[Value]:
        """The values, or the axis, that the papers found best in this outcome."""
        said = self.about.get("expected", {}).get(measure.key, [])
        return [value(v) for v in (said if isinstance(said, list) else [said])]

    @property
    def measures(self) -> list[Measure]:
        return [m for m in MEASURES if any(row.get(m.key) is not None for row in self.rows)]

    def points(self) -> list[tuple[str, dict[str, Value], int]]:
        """Folder, values and seed of every trained point that was asked for."""
        asked = [list(self.about["axes"][axis]) for axis in self.axes]
        return [
            ("-".join([*map(str, raw), f"s{seed}"]), dict(zip(self.axes, map(value, raw))), seed)
            for raw in itertools.product(*asked)
            for seed in self.seeds
        ]

    def where(self, values: Mapping[str, Any]) -> list[Row]:
        """The rows with these values of some factors, or with this seed."""
        return [row for row in self.rows if all(row[key] == v for key, v in values.items())]

    def ran(self, factor: str, rows: Iterable[Row] | None = None) -> list[Value]:
        """The values of a factor that were measured, in order."""
        seen = {row[factor] for row in (self.rows if rows is None else rows)}
        return [v for v in self.factors[factor] if v in seen]


def value(raw: object) -> Value:
    """A number where it reads as one, else text."""
    try:
        number = float(str(raw))
    except ValueError:
        return str(raw)
    return number if math.isfinite(number) else str(raw)


def shown(v: Value) -> str:
    return v if isinstance(v, str) else f"{v:g}"


def combinations(factors: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """Every choice of one value of each factor, the last factor fastest."""
    return [dict(zip(factors, values)) for values in itertools.product(*factors.values())]


def spread(numbers: Sequence[float | int]) -> Spread:
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Spread(float(np.mean(numbers)), deviation, min(numbers), max(numbers), len(numbers))


def read(path: Path) -> Sweep:
    """Reads a sweep's folder, or the pair NAME.json and NAME.csv that `tables.write_copy` leaves.

    Raises:
        UserError: a file is missing, damaged or of something else, cells were counted twice, or
            cells of one sweep were judged in different ways.
    """
    file = path / ABOUT if path.is_dir() else path
    about = _json(file)
    for key, kind in {"name": str, "axes": Mapping, "choices": Mapping, "seeds": Sequence}.items():
        if not isinstance(about.get(key), kind):
            raise UserError(f"{file} has no {key!r}: it is no sweep's; run `cascade sweep` again")
    axes, choices = (
        {name: tuple(map(value, values)) for name, values in about[kind].items()}
        for kind in ("axes", "choices")
    )
    rows = (
        _rows(path) if path.is_dir() else _read_csv(path.with_suffix(".csv"), {**axes, **choices})
    )
    asked = {**axes, **choices, SEED: tuple(map(int, about["seeds"]))}
    if len(asked) < len(axes) + len(choices) + 1 or (about.get("along") or SEED) not in asked:
        raise UserError(f"{file}: the names of axes, choices and 'along' do not fit together")
    kept = [row for row in rows if all(row.get(key) in values for key, values in asked.items())]
    _check(kept, list(asked), file)
    order = {key: {v: i for i, v in enumerate(values)} for key, values in asked.items()}
    kept.sort(key=lambda row: [order[key][row[key]] for key in asked])
    folder = path if path.is_dir() else None
    return Sweep(about, axes, choices, tuple(kept), folder, len(rows) - len(kept))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not there: name the folder of a sweep")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `cascade sweep` again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: run `cascade sweep` again")
    return content


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob(f"*/{CELLS}")):
        cost = _json(file.parent / COST) if (file.parent / COST).exists() else {}
        for number, line in enumerate(lines(file.read_text(encoding="utf-8")), start=1):
            try:
                cell = json.loads(line)
                values = {**cell.pop("point"), **cell.pop("choices", {})}
                row = {SEED: int(cell.pop(SEED)), **_flat(cell), **_flat(cost, "cost.")}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}, line {number} is not a cell: remove it and run `cascade sweep` again"
                ) from error
            if clash := values.keys() & row.keys():
                raise UserError(f"{file}: no axis or choice may be called {min(clash)}")
            rows.append({**{key: value(v) for key, v in values.items()}, **row})
    return rows


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; intervals become ends, all of a protocol text."""
    flat: dict[str, Any] = {}
    for key, v in nested.items():
        name = prefix + key
        if isinstance(v, Mapping):
            flat.update(_flat(v, f"{name}."))
        elif name.startswith(INTERVALS) and v is not None:
            flat[f"{name}.low"], flat[f"{name}.high"] = map(float, v)
        elif isinstance(v, str | int | float) and not name.startswith(PROTOCOL):
            flat[name] = v
        elif v is not None:
            flat[name] = v if isinstance(v, str) else json.dumps(v)
    return flat


def _check(rows: Sequence[Row], identity: Sequence[str], file: Path) -> None:
    seen = set()
    for row in rows:
        where = ", ".join(f"{key} {row[key]}" for key in identity)
        if where in seen:
            raise UserError(f"{file}: the cell at {where} is there twice: remove one")
        seen.add(where)
        for key, v in row.items():
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{file}: {key} at {where} is {v}: remove this cell, run it again")
    # Cells of an earlier version name a judge by its weights alone, which later ones say as well.
    named = [row for row in rows if PROTOCOL + JUDGES_WEIGHTS in row]
    judges = {row[PROTOCOL + JUDGES_WEIGHTS]: row.get(PROTOCOL + "judge") for row in named}
    for key in ("count", *(PROTOCOL + part for part in _ALIKE)):
        if len(found := {str(judges.get(row.get(key), row.get(key))) for row in rows}) > 1:
            raise UserError(
                f"{file}: cells differ in {key} ({', '.join(sorted(found))}) and do not compare: "
                "run `cascade sweep` again"
            )


def _read_csv(path: Path, factors: Container[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is not there: it belongs beside {path.with_suffix('.json').name}")
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: _number(key, text, factors) for key, text in line.items() if text}
            for line in csv.DictReader(file)
        ]


def _number(column: str, text: str, factors: Container[str]) -> Any:
    """What `_rows` has there: hashes of digits alone stay text, and whole numbers whole."""
    if column in factors:
        return value(text)
    if not column.startswith(PROTOCOL):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text
