"""What lies under the folders that the command names: models, runs, and sweeps with their cells.

A visitor names one of these; anything else is refused. Names are the paths as the command gives
them, so that they also work on the command line.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import cascade.conf
from cascade.batch import source
from cascade.errors import UserError
from cascade.eval.sweeps.folder import about_file, is_sweep, point_name, read_json
from cascade.runs.done import FROZEN
from cascade.runs.run import (
    CASCADE,
    CHECKPOINTS,
    CONFIG,
    HEARTBEATS,
    SAMPLES,
    TENSORBOARD,
    Run,
    read_yaml,
)

_SKIPPED = {CHECKPOINTS, SAMPLES, TENSORBOARD, HEARTBEATS, "launch", "drill", "shards"}
_LARGEST = 64_000  # bytes of a file that describes a cascade


# Kinds of `cascade edit`, and what they do. The first three need CLIP embeddings of pictures.
EDITS = {
    "vary": "vary a picture",
    "interpolate": "paint between two pictures",
    "change": "change a picture by a difference of captions",
    "inpaint": "paint a part anew",
    "outpaint": "paint beyond the edges",
}


@dataclass(frozen=True)
class Knob:
    """What a visitor can set of a stage, and what its model says; None: there is no such option."""

    stage: str
    scale: float | None
    steps: int | None


@dataclass(frozen=True)
class Place:
    """A model, a run or a sweep.

    Attributes:
        name: the path, as the command gives it.
        kind: "model" (a folder with a cascade.yaml, or another such file), "run" or "sweep".
    """

    name: str
    kind: str
    path: Path

    @property
    def there(self) -> bool:
        """Whether it has not been removed."""
        return self.path.exists()

    @property
    def file(self) -> Path:
        """The file that lists a model's stages."""
        return self.path if self.path.suffix == ".yaml" else self.path / CASCADE

    @cached_property
    def axes(self) -> dict[str, list[str]]:
        """The axes and choices of a sweep, and their values; its seeds at last."""
        if self.kind != "sweep":
            return {}
        about = read_json(about_file(self.path))
        named = {**about.get("axes", {}), **about.get("choices", {}), "seed": about["seeds"]}
        return {axis: [str(value) for value in values] for axis, values in named.items()}

    @cached_property
    def paints(self) -> bool:
        """Whether it paints captions: a model, or a run that reads nothing else."""
        return self.kind == "model" or (self.kind == "run" and reads(self.path) == {"caption"})

    @property
    def edits(self) -> list[str]:
        """The kinds of `cascade edit` that a model can do."""
        if self.kind != "model":
            return []
        runs = list(self.runs.values())
        stages = [str((_stage(run).get("codec") or {}).get("_target_")) for run in runs]
        painter = next(
            (i for i, codec in enumerate(stages) if codec.endswith((".Pixels", ".Latent"))), None
        )
        if painter is None:
            return []
        embedded = painter > 0 and "clip_image" in reads(runs[painter])
        return [kind for kind in EDITS if embedded or kind in ("inpaint", "outpaint")]

    @property
    def runs(self) -> dict[str, Path]:
        """The runs of a model's stages, by the stages' names; of a run, itself.

        Raises:
            UserError: a file is missing or damaged.
        """
        if self.kind == "run":
            return {self.path.name: self.path}
        at = self.file.parent
        return {name: at / str(of.get("run") or name) for name, of in self.stages.items()}

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The sampling choices of a model's stages.

        Raises:
            UserError: a file is missing or damaged.
        """
        if self.kind == "run":
            return {self.path.name: {}}
        stages = (read_yaml(self.file) or {}).get("stages")
        if not isinstance(stages, dict):
            raise UserError(f"{self.name} is not there any more, or damaged: choose another")
        return {name: of or {} for name, of in stages.items()}

    @property
    def knobs(self) -> list[Knob]:
        """The stages of a model in order, with what can be set; of a run, itself.

        Raises:
            UserError: a file is missing or damaged.
        """
        runs = self.runs
        return [_knob(name, of, runs[name]) for name, of in self.stages.items()]

    def cell(self, values: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
        """The point's folder of a sweep's cell, and its choices.

        Raises:
            UserError: a value is not one of the sweep's.
        """
        for axis, of in self.axes.items():
            if values.get(axis) not in of:
                raise UserError(f"{self.name} has no {axis} {values.get(axis)!r}: choose again")
        about = read_json(about_file(self.path))
        point = point_name([values[axis] for axis in about["axes"]], int(values["seed"]))
        return self.path / point, {name: values[name] for name in about["choices"]}


class Places:
    """What lies under some folders, by name."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = roots
        self._last: dict[str, Place] = {}

    def found(self) -> dict[str, Place]:
        """Look again: all models, then runs, then sweeps."""
        every = [place for root in self.roots for place in _under(root)]
        order = ("model", "run", "sweep")
        every.sort(key=lambda place: (order.index(place.kind), place.name))
        self._last = {place.name: place for place in every}
        return self._last

    def named(self, name: str | None, kinds: Sequence[str] = ("model", "run", "sweep")) -> Place:
        """The place that a visitor chose.

        Raises:
            UserError: there is none of this name and kind, or it was removed.
        """
        place = self._last.get(name or "") or self.found().get(name or "")
        if place is None or place.kind not in kinds:
            raise UserError("choose one from the list: there is no such model here")
        if not place.there:
            raise UserError(f"{name} is not there any more: choose another, or load the page again")
        return place


def _under(root: Path) -> Iterator[Place]:
    if root.suffix == ".yaml" and root.is_file():
        yield Place(str(root), "model", root)
        return
    for top, folders, files in os.walk(root):
        path = Path(top)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _SKIPPED)
        if is_sweep(path):
            yield Place(str(path), "sweep", path)
            folders.clear()
            continue
        for name in sorted(files):
            if name == CASCADE:
                yield Place(str(path), "model", path)
            elif name == CONFIG:
                yield Place(str(path), "run", path)
            elif name.endswith(".yaml") and name != FROZEN and _is_cascade(path / name):
                yield Place(str(path / name), "model", path / name)


def _is_cascade(path: Path) -> bool:
    content = read_yaml(path) if path.stat().st_size < _LARGEST else None
    return isinstance(content, dict) and list(content) == ["stages"]


def reads(run: Path) -> set[str]:
    """The sources of what the conditions of a run's stage read; none if it is no stage."""
    conditioner = (_stage(run).get("conditioner") or {}).get("embedders") or {}
    return {source(key) for key in conditioner}


@lru_cache(maxsize=256)
def _config(file: Path, _changed: int, _size: int) -> Any:
    return read_yaml(file)


def _stage(run: Path) -> Mapping[str, Any]:
    """The configuration of a run's stage, which is read again if its file was changed."""
    file = Run(run).config_file
    try:
        at = file.stat()
    except OSError:
        return {}
    config = _config(file, at.st_mtime_ns, at.st_size)
    return (config.get("stage") if isinstance(config, dict) else None) or {}


def _knob(name: str, choices: Mapping[str, Any], run: Path) -> Knob:
    """What can be set of a stage; its own choices come before those of its run."""
    if choices.get("text_embedding"):
        return Knob(name, None, None)
    sampler = _sampler(choices.get("sampler"), run)
    scale = choices.get("scale", sampler.get("scale", 1.0))
    steps = choices.get("steps", sampler.get("steps"))
    return Knob(name, float(scale), int(steps) if steps else None)


def _sampler(other: str | None, run: Path) -> Mapping[str, Any]:
    """The options of a stage's sampler, or of the one in conf/sampler/ that is chosen for it."""
    if other:
        return read_yaml(Path(cascade.conf.__path__[0]) / "sampler" / f"{other}.yaml") or {}
    return _stage(run).get("sampler") or {}
