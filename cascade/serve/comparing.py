"""What is compared: models, runs and cells of sweeps, read from their files alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from cascade.errors import UserError
from cascade.eval.sweeps.folder import Point
from cascade.runs.done import FROZEN
from cascade.runs.run import CONFIG, Run, read_yaml
from cascade.serve.asked import Painting
from cascade.serve.places import Place

METRICS = "metrics.json"  # of a model, as `cascade evaluate` writes it


class Number(NamedTuple):
    """A measure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        title: of it, which tells the cell of a sweep.
        model: what paints.
        sets: the sampling choices of a sweep's cell.
        point: the folder of a sweep's trained point, and the choices of its cell; None: no cell.
        values: of a sweep's axes.
    """

    title: str
    model: Place
    sets: tuple[str, ...] = ()
    point: tuple[Path, Mapping[str, str]] | None = None
    values: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Place, values: Mapping[str, str]) -> "Side":
        """A place, or with the values of all axes the cell of a sweep.

        Raises:
            UserError: the sweep has no such value, or a file is missing or damaged.
        """
        if place.kind != "sweep":
            return cls(place.name, place)
        folder, choices = place.cell(values)
        title = title_of(place, values)
        model = Place(str(folder), "model", folder)
        return cls(title, model, _sets(folder, choices), (folder, choices), values)

    def painting(self, captions: Sequence[str], seed: int) -> Painting:
        return Painting(self.model, tuple(captions), seed=seed, sets=self.sets)

    @property
    def stored(self) -> Path | None:
        """The pictures that were painted already: of a cell, or the newest of a training."""
        if self.point is not None:
            path = Point(self.point[0]).grid(self.point[1])
            return path if path.is_file() else None
        for run in reversed(list(self.model.runs.values())):
            if found := grids(run):
                return found[-1]
        return None

    def config(self) -> dict[str, str]:
        """What it is made with: sampling choices, and its stages' configurations, flat."""
        found = {f"axis {axis}": value for axis, value in self.values.items()}
        if self.point is not None and not self.model.file.exists():
            return found  # a cell keeps its numbers and pictures when its weights are removed
        for name, choices in self.model.stages.items():
            found |= {f"{name}.{key}": text for key, text in _flat(choices)}
        for choice in self.sets:
            key, _, value = choice.partition("=")
            found[key] = value
        for name, run in self.model.runs.items():
            config = read_yaml(run / CONFIG) or {}
            found |= {f"{name}: {key}": text for key, text in _flat(config) if key != "run"}
        return found

    def numbers(self) -> dict[str, Number]:
        """All measures that have an interval, by their names in the file."""
        if self.point is not None:
            folder, choices = self.point
            rows = Point(folder).cells()
            wanted = {axis: str(value) for axis, value in choices.items()}
            at = [r for r in rows if {k: str(v) for k, v in r["choices"].items()} == wanted]
            return dict(_numbers(at[0])) if at else {}
        path = self.model.file.parent / METRICS if self.model.kind == "model" else None
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError):
            return {}
        return dict(_numbers(content))


def title_of(place: Place, values: Mapping[str, str]) -> str:
    """The title of a sweep's cell."""
    return f"{place.name}: " + ", ".join(f"{axis} {values[axis]}" for axis in place.axes)


def cells(place: Place) -> Iterator[tuple[dict[str, str], Path]]:
    """The values and the stored samples of each cell of a sweep that has some."""
    for values in product(*place.axes.values()):
        named = dict(zip(place.axes, values))
        folder, choices = place.cell(named)
        if (path := Point(folder).grid(choices)).is_file():
            yield named, path


def grids(run: Path) -> list[Path]:
    """The sample grids of a training, oldest first."""
    return sorted(path for path in Run(run).samples.glob("*.png") if path.stem.isdigit())


def differences(sides: Sequence[Side]) -> list[list[str]]:
    """Rows of a key and its value at each side, for the keys whose values differ."""
    configs = [side.config() for side in sides]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(config.get(key, "") for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def measured(sides: Sequence[Side]) -> list[list[str]]:
    """Rows of a measure and its value with its interval at each side, if any has it."""
    found = [side.numbers() for side in sides]
    keys = dict.fromkeys(key for of in found for key in of)
    return [[key, *(str(of[key]) if key in of else "" for of in found)] for key in keys]


def _sets(point: Path, choices: Mapping[str, str]) -> tuple[str, ...]:
    """The sampling choices that a cell makes, from what its measurement was asked for."""
    if not choices:
        return ()
    asked = (read_yaml(Point(point).evaluation / FROZEN) or {}).get("choices") or {}
    sets: list[str] = []
    for axis, value in choices.items():
        named = {str(key): of for key, of in (asked.get(axis) or {}).items()}
        sets += named.get(value, [])
    return tuple(sets)


def _numbers(content: Any, prefix: str = "") -> Iterator[tuple[str, Number]]:
    if not isinstance(content, Mapping):
        return
    ends = content.get("intervals")
    for key, of in ends.items() if isinstance(ends, Mapping) else ():
        if isinstance(value := content.get(key), int | float) and of is not None:
            yield prefix + key, Number(value, *map(float, of))
    for key, value in content.items():
        if key != "intervals":
            yield from _numbers(value, f"{prefix}{key}.")


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def check_two(sides: Sequence[Side]) -> None:
    """Raise UserError if there is nothing to compare."""
    if len(sides) < 2:
        raise UserError("choose two or more to compare")
