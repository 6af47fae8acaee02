"""Sampling with ControlNets: the pictures of conditions that a user gives, and runs that join."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.adapters.adapter import base_hash
from cascade.batch import Batch, hint_key, weight_key
from cascade.config.compose import built
from cascade.data.transforms import Condition, scaled
from cascade.encoders.weights import tensors_hash
from cascade.errors import UserError
from cascade.formats.rgb import read_picture
from cascade.pipeline import Cascade, innermost
from cascade.runs.cascade_file import companions, stage_runs
from cascade.runs.run import Run
from cascade.stage import Stage


class Control(NamedTuple):
    """A picture of a condition in [-1, 1], and how much it counts."""

    name: str
    picture: Tensor
    weight: float

    def rows(self, count: int) -> Batch:
        """The keys of a batch for `count` captions."""
        size = self.picture.shape[-1]
        return {
            hint_key(self.name, size): self.picture.expand(count, -1, -1, -1),
            weight_key(self.name): torch.full((count,), self.weight),
        }

    @property
    def identity(self) -> dict[str, str | float]:
        """In JSON, for manifests."""
        return {"picture": tensors_hash({"picture": self.picture}), "weight": self.weight}


def controls_of(cascade: Cascade, words: Sequence[str]) -> list[Control]:
    """Read the pictures of conditions, given as NAME=FILE or NAME=FILE:WEIGHT.

    Raises:
        UserError: a word has another form, no stage reads the condition, or a picture cannot be
            read or has another size.
    """
    found = [_control(cascade, word) for word in words]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--control {twice[0]} is given twice: give one picture of each condition")
    return found


def _control(cascade: Cascade, word: str) -> Control:
    name, _, rest = word.partition("=")
    file, weight = _weighted(word, rest)
    sizes = sizes_of(cascade)
    if name not in sizes:
        known = f"the stages read {', '.join(sizes)}" if sizes else "no stage reads any"
        raise UserError(
            f"--control {name}: {known}; train one with start=RUN control=..., and name its run, "
            "as --set decoder.controls=[RUN]"
        )
    if len(sizes[name]) > 1:
        some = " and ".join(map(str, sorted(sizes[name])))
        raise UserError(
            f"--control {name}: stages read it at {some} px; train them with one control.size"
        )
    (size,) = sizes[name]
    picture = read_picture(file)
    if picture.shape[:2] != (size, size):
        height, width = picture.shape[:2]
        raise UserError(
            f"{file} has {width} x {height} pixels, but {name} is read at {size} x {size}: "
            "give a picture of that size"
        )
    return Control(name, scaled(picture)[None], weight)


def _weighted(word: str, rest: str) -> tuple[Path, float]:
    """The file and the weight of NAME=FILE[:WEIGHT]; a file's own name may have colons."""
    file, colon, number = rest.rpartition(":")
    if not rest:
        raise UserError(f"--control {word}: give NAME=FILE, or NAME=FILE:WEIGHT")
    if not colon or Path(rest).exists():
        return Path(rest), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(
            f"--control {word}: the weight {number!r} is no number, as in NAME=FILE:0.5"
        )
    return Path(file), weight


def sizes_of(cascade: Cascade) -> dict[str, set[int]]:
    """The sides at which the stages of a cascade read pictures of conditions, by condition."""
    found: dict[str, set[int]] = {}
    for link in cascade.stages:
        for name, control in innermost(link).control.items():
            found.setdefault(name, set()).add(control.size)
    return found


def conditions_of(file: Path, choices: Sequence[str] = ()) -> dict[str, Condition]:
    """How the conditions that a cascade's stages read are computed, by name.

    Args:
        file: `cascade.yaml`.
        choices: sampling choices that override those of the file.
    """
    found: dict[str, Condition] = {}
    for path in (stage_runs(file, choices) | companions(file, choices)).values():
        if not Run(path).config_file.exists():  # an adapter that another program trained
            continue
        pictures = Run(path).config.get("data", {}).get("pictures", {})
        found |= built(pictures.get("conditions") or {})
    return found


def joined(stage: Stage, names: Sequence[str], run: Run) -> Stage:
    """The stage with the ControlNets of other runs, which are next to its own.

    Raises:
        UserError: a run has no ControlNets, steers another network, or a condition that the stage
            reads already.
    """
    control = dict(stage.control)
    for name in names:
        other = Run(run.path.parent / name).load().to(stage.device)
        if not other.control:
            raise UserError(f"controls={name}: it was trained without control=...")
        theirs, own = base_hash(other.state_dict()), base_hash(stage.state_dict())
        if theirs != own:
            raise UserError(
                f"controls={name}: it steers another network ({theirs}) than that of "
                f"{run.path.name} ({own}); train it with start={run.path}"
            )
        if twice := sorted(control.keys() & other.control.keys()):
            raise UserError(f"controls={name}: the stage reads {twice[0]} already; leave it out")
        control |= dict(other.control)
    return stage.altered(control=nn.ModuleDict(control))
