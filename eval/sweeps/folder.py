"""The folder of a sweep: this module alone names, writes and reads its files.

    sweep.json              what the sweep asks
    POINT/                  a trained point, such as clip_32-unet_16-s0: values of the axes, seed
        cells.jsonl         one line per measured cell
        cost.json           size and cost of the trained stage
        grids/              truth.png, and samples of each cell, such as scale=2,steps=8.png
        nearest.png         samples, and the training pictures nearest to them
        evaluation/         the folder of the task that measures the point
        STAGE/              the run of the trained stage
    report/                 the folder of the task that reports

`cascade report --findings` keeps what remains of a sweep as two files, NAME.json and NAME.csv.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.errors import UserError
from cascade.files.atomic import write_atomically
from cascade.formats.texts import lines
from cascade.runs.run import METRICS

SEED, STEPS, EVALUATIONS = "seed", "steps", "evaluations"  # of a cell
_ABOUT, _CELLS, _COST, _GRIDS = "sweep.json", "cells.jsonl", "cost.json", "grids"


@dataclass(frozen=True)
class Point:
    """The files of one trained point."""

    folder: Path

    @property
    def evaluation(self) -> Path:
        """The folder of the task that measures the point."""
        return self.folder / "evaluation"

    @property
    def losses(self) -> list[Path]:
        """The metrics of the point's own trainings."""
        return sorted(self.folder.glob(f"*/{METRICS}"))

    @property
    def count(self) -> int:
        """The number of measured cells, without parsing them."""
        return self.cells_file.read_text().count("\n") if self.cells_file.exists() else 0

    @property
    def cells_file(self) -> Path:
        return self.folder / _CELLS

    def cells(self) -> list[dict[str, Any]]:
        """Read the measured cells.

        Raises:
            UserError: a line is not a cell.
        """
        if not self.cells_file.exists():
            return []
        text, rows = self.cells_file.read_text(encoding="utf-8"), []
        for number, line in enumerate(lines(text), start=1):
            try:
                row = json.loads(line)
                kept = {"point": dict(row["point"]), SEED: int(row[SEED])}
                rows.append({**row, **kept, "choices": dict(row.get("choices", {}))})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.cells_file}, line {number} is not a cell: remove the line and run "
                    "`cascade sweep` again"
                ) from error
        return rows

    def write_cells(self, rows: Iterable[Mapping[str, Any]]) -> None:
        _write(self.cells_file, "".join(json.dumps(row) + "\n" for row in rows))

    def cost(self) -> dict[str, Any]:
        path = self.folder / _COST
        return read_json(path) if path.exists() else {}

    def write_cost(self, cost: Mapping[str, Any]) -> None:
        _write(self.folder / _COST, json.dumps(cost))

    @property
    def truth(self) -> Path:
        """The grid of the captions' true pictures."""
        return self.folder / _GRIDS / "truth.png"

    @property
    def nearest(self) -> Path:
        """Samples, and the training pictures nearest to them."""
        return self.folder / "nearest.png"

    def grid(self, choices: Mapping[str, object]) -> Path:
        """Return the file of a cell's samples."""
        name = ",".join(f"{axis}={value}" for axis, value in choices.items()) or "painted"
        return self.folder / _GRIDS / f"{name}.png"

    def grids(self) -> Iterator[tuple[dict[str, str], Path]]:
        """Yield the choices, as text, and the file of every cell's samples."""
        for path in sorted((self.folder / _GRIDS).glob("*.png")):
            parts = [part.partition("=") for part in path.stem.split(",")]
            if path != self.truth:
                yield {axis: value for axis, sign, value in parts if sign}, path


def point_name(values: Iterable[object], seed: int) -> str:
    """Return the name of a point's folder."""
    return "-".join([*map(str, values), f"s{seed}"])


def setting_of(point: str) -> str:
    """Return the part of a point's name that its seeds share."""
    return point.rpartition("-s")[0]


def report_task(root: Path) -> Path:
    """Return the folder of the task that reports a sweep."""
    return root / "report"


def is_sweep(folder: Path) -> bool:
    return (folder / _ABOUT).is_file()


def find_sweeps(root: Path) -> list[Path]:
    """Return `root` if it is a sweep, else the sweeps directly in it, else the NAME.json in it.

    Raises:
        UserError: there is none of these.
    """
    for pattern in (_ABOUT, f"*/{_ABOUT}"):
        if files := sorted(root.glob(pattern)):
            return [path.parent for path in files]
    if copies := find_copies(root):
        return copies
    raise UserError(f"{root} contains no sweep: name a folder that `cascade sweep` wrote")


def find_copies(folder: Path) -> list[Path]:
    """Return the NAME.json of every sweep that `save_copy` wrote into a folder."""
    return sorted(folder.glob("*.json"))


def about_file(path: Path) -> Path:
    """Return the file that describes a sweep, given its folder or its NAME.json."""
    return path / _ABOUT if path.is_dir() else path


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    _write(folder / _ABOUT, json.dumps(about, indent=1) + "\n")


def save_copy(
    folder: Path, about: Mapping[str, Any], columns: Sequence[str], table: Iterable[Sequence[Any]]
) -> None:
    """Write NAME.json and NAME.csv, from which the findings can be regenerated."""
    text = json.dumps(dict(about), indent=1, ensure_ascii=False) + "\n"
    _write(folder / f"{about['name']}.json", text)
    write_csv(folder / f"{about['name']}.csv", columns, table)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a sweep's JSON files; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a sweep")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `cascade sweep` again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: run `cascade sweep` again")
    return content


def write_csv(path: Path, columns: Sequence[str], table: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *table])
    _write(path, text.getvalue())


def read_copied_cells(path: Path) -> list[dict[str, str]]:
    """Read NAME.csv, given NAME.json; empty fields are left out."""
    table = path.with_suffix(".csv")
    if not table.is_file():
        raise UserError(f"{table} does not exist: it belongs next to {path.name}")
    with table.open(newline="", encoding="utf-8") as file:
        return [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]


def write_picture(path: Path, sheet: Image.Image) -> None:
    write_atomically(path, lambda partial: sheet.save(partial, "PNG"))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
