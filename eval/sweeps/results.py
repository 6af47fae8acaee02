"""The results of a sweep: its cells, read from its folder or the CSV copy of it, and its tables.

A cell is a flat mapping: the values of the axes (trained) and choices (of sampling) by name, the
`seed`, the measures, "cost.*" and "protocol.*". Values that look like numbers are numbers, so "2",
2 and 2.0 are the same value. Cells that were asked for but not measured are reported as not run.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.eval.metrics.measures import SWEEPS, Measure, measures
from cascade.eval.pages.spread import spread
from cascade.eval.sweeps import folder as files
from cascade.eval.sweeps.folder import SEED, Point

Value = str | float  # of an axis or a choice
Values = Mapping[str, Value]
Cell = Mapping[str, Any]

PROTOCOL, INTERVALS = "protocol.", "intervals."
JUDGES_WEIGHTS = "judge's weights"
# Parts of the protocol that all cells of a sweep must share to be comparable.
_COMMON = ("judge", "split", "reference", "features", "captions of each kind")


@dataclass(frozen=True)
class Sweep:
    """What was asked (`about`, the content of sweep.json) and what was measured (`rows`).

    Args:
        axes, choices: the values of each factor, in order.
        folder: the sweep's folder with its grids and trainings; None: only the cells are left.
        stale: number of cells left out because their values are no longer asked for.
    """

    about: Mapping[str, Any]
    axes: Mapping[str, tuple[Value, ...]]
    choices: Mapping[str, tuple[Value, ...]]
    rows: tuple[Cell, ...]
    folder: Path | None = None
    stale: int = 0

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def place(self) -> str:
        """The name of its folder, which is unique among sweeps in the same place."""
        return self.folder.resolve().name if self.folder else self.name

    @property
    def factors(self) -> dict[str, tuple[Value, ...]]:
        return {**self.axes, **self.choices}

    @property
    def x(self) -> str | None:
        """The factor along which curves are drawn; None if the sweep varies only the seed."""
        return self.about.get("along") or next(reversed(self.factors), None)

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.about["seeds"]]

    @property
    def control(self) -> Value | None:
        """The value that serves as a control and is not one of the sizes compared."""
        return None if self.about.get("control") is None else as_value(self.about["control"])

    def expected(self, measure: Measure) -> list[Value]:
        """The values, or the axis, that the papers found best by this measure."""
        best = self.about.get("expected", {}).get(measure.key, [])
        return [as_value(v) for v in (best if isinstance(best, list) else [best])]

    @property
    def measures(self) -> list[Measure]:
        return [measure for measure in measures(SWEEPS) if self.numbers(measure.key)]

    def points(self) -> list[tuple[str, dict[str, Value], int]]:
        """Folder, values and seed of every trained point that was asked for."""
        asked = [list(self.about["axes"][axis]) for axis in self.axes]
        return [
            (files.point_name(raw, seed), dict(zip(self.axes, map(as_value, raw))), seed)
            for raw in itertools.product(*asked)
            for seed in self.seeds
        ]

    def where(self, values: Mapping[str, Any]) -> list[Cell]:
        """The cells with these values of some factors, or with this seed."""
        return [row for row in self.rows if all(row[key] == v for key, v in values.items())]

    def numbers(self, key: str, values: Mapping[str, Any] = {}) -> list[Any]:
        """What the cells with these values have under a key, without those that lack it."""
        return [row[key] for row in self.where(values) if row.get(key) is not None]

    def ran(self, factor: str) -> list[Value]:
        """The values of a factor that were measured, in order."""
        seen = {row[factor] for row in self.rows}
        return [v for v in self.factors[factor] if v in seen]


def as_value(raw: object) -> Value:
    """Convert to a number if it looks like one, else to text."""
    try:
        number = float(str(raw))
    except ValueError:
        return str(raw)
    return number if math.isfinite(number) else str(raw)


def shown(v: Value) -> str:
    return v if isinstance(v, str) else f"{v:g}"


def combinations(factors: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """Return the Cartesian product of the factors' values; the last factor varies fastest."""
    return [dict(zip(factors, values)) for values in itertools.product(*factors.values())]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's folder, or the pair NAME.json and NAME.csv that `write_copy` writes.

    Raises:
        UserError: a file is missing, damaged or not a sweep's, a cell occurs twice, or cells were
            measured with different protocols.
    """
    file = files.about_file(path)
    about = files.read_json(file)
    for key, kind in {"name": str, "axes": Mapping, "choices": Mapping, "seeds": Sequence}.items():
        if not isinstance(about.get(key), kind):
            raise UserError(
                f"{file} has no {key!r}, so it is not a sweep: run `cascade sweep` again"
            )
    axes, choices = (
        {name: tuple(map(as_value, values)) for name, values in about[kind].items()}
        for kind in ("axes", "choices")
    )
    cut = about.get("cut", {})
    rows = _cells(path, cut) if path.is_dir() else _copied_cells(path, {**axes, **choices})
    asked = {**axes, **choices, SEED: tuple(map(int, about["seeds"]))}
    if len(asked) < len(axes) + len(choices) + 1 or (about.get("along") or SEED) not in asked:
        raise UserError(f"{file}: the names of axes, choices and 'along' do not fit together")
    kept = [row for row in rows if all(row.get(key) in values for key, values in asked.items())]
    _check(kept, list(asked), file)
    order = {key: {v: i for i, v in enumerate(values)} for key, values in asked.items()}
    kept.sort(key=lambda row: [order[key][row[key]] for key in asked])
    folder = path if path.is_dir() else None
    return Sweep(about, axes, choices, tuple(kept), folder, len(rows) - len(kept))


def _cells(folder: Path, cut: Container[str]) -> list[dict[str, Any]]:
    """The cells of a sweep's folder, but those of settings that were `cut` before their end."""
    rows = []
    for path in sorted(folder.iterdir()):
        if files.setting_of(path.name) in cut:
            continue
        cells = Point(path).cells()
        cost = _flat(Point(path).cost(), "cost.") if cells else {}
        for cell in cells:
            values = {**cell.pop("point"), **cell.pop("choices")}
            try:
                row = {SEED: cell.pop(SEED), **_flat(cell), **cost}
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}: the cell at {values} has a bad interval") from error
            if clash := values.keys() & row.keys():
                raise UserError(f"{path}: no axis or choice may be called {min(clash)}")
            rows.append({**{key: as_value(v) for key, v in values.items()}, **row})
    return rows


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys by dots; split intervals into their ends; make protocol values text."""
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


def _check(rows: Sequence[Cell], identity: Sequence[str], file: Path) -> None:
    seen = set()
    for row in rows:
        where = ", ".join(f"{key} {row[key]}" for key in identity)
        if where in seen:
            raise UserError(f"{file}: the cell at {where} occurs twice: remove one")
        seen.add(where)
        for key, v in row.items():
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(
                    f"{file}: {key} at {where} is {v}: remove the cell and run it again"
                )
    # Earlier versions named a judge by the hash of its weights alone; later ones record both.
    named = [row for row in rows if PROTOCOL + JUDGES_WEIGHTS in row]
    judges = {row[PROTOCOL + JUDGES_WEIGHTS]: row.get(PROTOCOL + "judge") for row in named}
    for key in ("count", *(PROTOCOL + part for part in _COMMON)):
        if len(found := {str(judges.get(row.get(key), row.get(key))) for row in rows}) > 1:
            raise UserError(
                f"{file}: cells differ in {key} ({', '.join(sorted(found))}) and do not compare: "
                "run `cascade sweep` again"
            )


def _copied_cells(path: Path, factors: Container[str]) -> list[dict[str, Any]]:
    rows = files.read_copied_cells(path)
    return [{key: _parsed(key, text, factors) for key, text in row.items()} for row in rows]


def _parsed(column: str, text: str, factors: Container[str]) -> Any:
    """Parse a CSV field as `_cells` has it; digits in the protocol are hashes, and stay text."""
    if column in factors:
        return as_value(text)
    if not column.startswith(PROTOCOL):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def write_cells(sweep: Sweep, path: Path) -> None:
    """Write one line per measured cell."""
    files.write_csv(path, *_table(sweep))


def write_copy(sweep: Sweep, folder: Path) -> None:
    """Write NAME.json and NAME.csv, from which `read_sweep` restores the cells exactly."""
    files.save_copy(folder, sweep.about, *_table(sweep))


def write_summary(sweep: Sweep, path: Path) -> None:
    """Write mean, standard deviation and extremes over seeds of every number, for each setting.

    A setting that was not run has n = 0.
    """
    measured = {k for row in sweep.rows for k, v in row.items() if isinstance(v, float | int)}
    keys = sorted(measured - {*sweep.factors, SEED})
    keys = [key for key in keys if not key.startswith(PROTOCOL)]
    parts = ("mean", "deviation", "low", "high")
    columns = [*sweep.factors, "n", *(f"{key}.{part}" for key in keys for part in parts)]
    lines = []
    for values in combinations(sweep.factors):
        line: list[Any] = [*values.values(), len(sweep.where(values))]
        for key in keys:
            numbers = sweep.numbers(key, values)
            line += spread(numbers)[:4] if numbers else [None] * 4
        lines.append(line)
    files.write_csv(path, columns, lines)


def _table(sweep: Sweep) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: factors, seed, and every key of any cell."""
    first = [*sweep.factors, SEED]
    columns = list(dict.fromkeys([*first, *(key for row in sweep.rows for key in row)]))
    return columns, [[row.get(column) for column in columns] for row in sweep.rows]
