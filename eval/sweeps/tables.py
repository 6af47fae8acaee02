"""The tables of a sweep: all cells, and for every setting the mean over seeds."""

from pathlib import Path
from typing import Any

from cascade.eval.pages.spread import spread
from cascade.eval.sweeps import folder as files
from cascade.eval.sweeps.folder import SEED, write_csv
from cascade.eval.sweeps.results import PROTOCOL, Sweep, combinations


def write_cells(sweep: Sweep, path: Path) -> None:
    """Write one line per measured cell."""
    write_csv(path, *_cells(sweep))


def write_copy(sweep: Sweep, folder: Path) -> None:
    """Write NAME.json and NAME.csv, from which `read_sweep` restores the cells exactly."""
    files.save_copy(folder, sweep.name, sweep.about, *_cells(sweep))


def write_summary(sweep: Sweep, path: Path) -> None:
    """Write mean, standard deviation and extremes over seeds of every number, for each setting.

    A setting that was not run has n = 0.
    """
    keys = sorted({key for row in sweep.rows for key, v in row.items() if _is_measured(key, v)})
    keys = [key for key in keys if key not in (*sweep.factors, SEED)]
    parts = ("mean", "deviation", "low", "high")
    columns = [*sweep.factors, "n", *(f"{key}.{part}" for key in keys for part in parts)]
    lines = []
    for values in combinations(sweep.factors):
        rows = sweep.where(values)
        line: list[Any] = [*values.values(), len(rows)]
        for key in keys:
            numbers = [row[key] for row in rows if row.get(key) is not None]
            line += spread(numbers)[:4] if numbers else [None] * 4
        lines.append(line)
    write_csv(path, columns, lines)


def _cells(sweep: Sweep) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows: factors, seed, and every key of any cell."""
    first = [*sweep.factors, SEED]
    columns = list(dict.fromkeys([*first, *(key for row in sweep.rows for key in row)]))
    return columns, [[row.get(column) for column in columns] for row in sweep.rows]


def _is_measured(key: str, v: object) -> bool:
    return isinstance(v, float | int) and not key.startswith(PROTOCOL)
