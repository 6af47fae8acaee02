"""The tables of a sweep: every cell, and the means over seeds of every setting."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.eval.ablation import PROTOCOL, SEED, Sweep, combinations, spread
from cascade.files import write_atomically


def write_cells(sweep: Sweep, path: Path) -> None:
    """One line per measured cell. `read` makes the same rows of it, to the last digit."""
    first = [*sweep.factors, SEED]
    columns = list(dict.fromkeys([*first, *(key for row in sweep.rows for key in row)]))
    _write_csv(path, columns, [[row.get(column) for column in columns] for row in sweep.rows])


def write_copy(sweep: Sweep, folder: Path) -> None:
    """NAME.json and NAME.csv: all that the findings are made of."""
    text = json.dumps(dict(sweep.about), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{sweep.name}.json", lambda path: path.write_text(text))
    write_cells(sweep, folder / f"{sweep.name}.csv")


def write_summary(sweep: Sweep, path: Path) -> None:
    """Mean, deviation and extremes over seeds of all that was measured, per setting.

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
    _write_csv(path, columns, lines)


def _is_measured(key: str, v: object) -> bool:
    return isinstance(v, float | int) and not key.startswith(PROTOCOL)


def _write_csv(path: Path, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])
    write_atomically(path, lambda beside: beside.write_text(text.getvalue(), encoding="utf-8"))
