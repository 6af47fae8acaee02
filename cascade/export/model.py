"""A whole cascade as one folder, from which `cascade sample --model` runs on any machine.

    FOLDER/cascade.yaml           the stages and how each is sampled
    FOLDER/STAGE/config.yaml      without paths of this machine
    FOLDER/STAGE/weights.safetensors
    FOLDER/clip/ (or t5/...)      the frozen encoders that the stages read with

Paths of encoders count from the stage's directory (`../clip`). What is unknown elsewhere, such as
`data.path`, is left to be given.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cascade.adapters.lora import fuse
from cascade.adapters.words import WORD
from cascade.config.compose import saved
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.export.encoders import Place, kind_of, place_of, write_encoder
from cascade.export.tokenizer import write_tokenizer
from cascade.runs.averages import averaged
from cascade.runs.cascade_file import CASCADE, stage_choices, stage_runs
from cascade.runs.resumable import PLACES
from cascade.runs.run import Run

TOKENIZER = "tokenizer"  # the folder of CLIP's, for other programs
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_KEYS = ("path_or_name", "folder")  # by which an encoder's configuration names its files
_MISSING = "???"  # OmegaConf's, for what has to be given
Places = Mapping[Place, str]  # where an encoder's files are -> its folder here


@dataclass(frozen=True)
class Part:
    """A stage of the exported model, or a run that one is guided away from.

    Attributes:
        name: its folder.
        run: where it was trained.
        stage: with the run's weights.
        choices: how it is sampled; None: nothing is chosen.
        sampled: whether it is a stage of the cascade.
        words: runs of words that it has learned.
    """

    name: str
    run: Run
    stage: Any
    choices: dict[str, Any] | None
    sampled: bool = True
    words: tuple[Path, ...] = ()


def parts_of(model: Path) -> list[Part]:
    """Loads the stages of a model, which checks their weights and encoders.

    Args:
        model: the directory of a cascade, or its file.

    Raises:
        UserError: a stage cannot be loaded, or its name cannot be that of a folder.
    """
    file = model if model.suffix == ".yaml" else model / CASCADE
    runs, found = stage_runs(file), {}
    for name, given in stage_choices(file, ()).items():
        choices = {key: value for key, value in (given or {}).items() if key != "run"}
        stage = (run := Run(runs[name])).load()
        if length := choices.pop("length", None):
            averaged(stage, run, length)
        words = [Path(one) for one in choices.pop("words", None) or ()]
        if adapters := choices.pop("adapters", None):
            if words:
                raise UserError(f"{file}: {name} has words and adapters: leave one of them out")
            fuse(stage, [(Path(one["path"]), one.get("weight", 1.0)) for one in adapters])
        found[name] = Part(name, run, stage, choices or None, words=tuple(words))
        beside = partial(_beside, runs, found, run)
        if weaker := choices.get("weaker"):
            choices["weaker"] = beside(f"{name}.weaker", weaker)
        if controls := choices.get("controls"):
            choices["controls"] = [beside(f"{name}.controls", one) for one in controls]
    if wrong := [name for name in found if not _NAME.fullmatch(name)]:
        raise UserError(f"{file}: a stage named {wrong[0]!r} cannot be a folder: rename it")
    return list(found.values())


def _beside(
    runs: Mapping[str, Path], found: dict[str, Part], run: Run, where: str, name: str
) -> str:
    """Adds a run that a sampling choice names, if no stage is it; returns its directory's name."""
    other = Run(run.path.parent / name)
    if (own := other.path.name) not in runs:
        found[own] = Part(own, other, other.load(), None, False)
    elif runs[own].resolve() != other.path.resolve():
        raise UserError(f"{where}={name} has the name of another stage: rename its directory")
    return own


def write_model(parts: Sequence[Part], folder: Path) -> dict[str, Any]:
    """Writes the stages, their encoders and `cascade.yaml`; returns the encoders by folder."""
    encoders = _encoders(parts)
    places = {place: name for name, (encoder, names) in encoders.items() for place in names}
    for name, (encoder, _) in encoders.items():
        write_encoder(encoder, folder / name)
    clips = [e for e, _ in encoders.values() if isinstance(e, FrozenCLIP)]
    if clips:
        write_tokenizer(folder / TOKENIZER, clips[0].length)
    for part in parts:
        run = Run(folder / part.name)
        run.path.mkdir()
        saved(OmegaConf.create(portable(part.run, places)), run.config_file)
        with torch.device("meta"):
            part.stage.encoders = run.stage().encoders  # whose hashes go into the weights
        part.stage.export(run.path)
        run.load()  # or nothing is exported
    stages = {part.name: part.choices for part in parts if part.sampled}
    for part in parts:
        for number, word in enumerate(part.words, 1):
            own = f"{part.name}_word{number}"
            (folder / own).mkdir()
            shutil.copyfile(word / WORD, folder / own / WORD)
            stages[part.name] = of = stages[part.name] or {}
            of["words"] = [*of.get("words", ()), own]
    (folder / CASCADE).write_text(OmegaConf.to_yaml({"stages": stages}))
    return {name: encoder for name, (encoder, _) in encoders.items()}


def _encoders(parts: Sequence[Part]) -> dict[str, tuple[Any, list[Place]]]:
    """The encoders of all stages by a folder's name, each with all that names it in them."""
    found: dict[str, tuple[Any, list]] = {}
    taken = {part.name for part in parts} | {TOKENIZER}
    by_weights: dict[str, str] = {}
    for encoder in (encoder for part in parts for encoder in part.stage.frozen):
        if not (kind := kind_of(encoder)):
            continue
        place = place_of(encoder)
        if any(place in names for _, names in found.values()):
            continue
        if encoder.hash not in by_weights:
            free = [n for i in range(1, 100) if (n := f"{kind}{i if i > 1 else ''}") not in taken]
            taken.add(free[0])
            by_weights[encoder.hash] = free[0]
            found[free[0]] = (encoder, [])
        found[by_weights[encoder.hash]][1].append(place)
    return found


def portable(run: Run, places: Places) -> dict[str, Any]:
    """A run's configuration without paths of this machine.

    Args:
        places: the folders of encoders in the model.
    """
    known: dict[str, str] = {}
    for (name, _), folder in places.items():
        known |= {str(Path(name).resolve()): folder} if Path(name).exists() else {}

    def located(node: Any, where: str) -> Any:
        if isinstance(node, list):
            return [located(value, f"{where}.{i}") for i, value in enumerate(node)]
        if not isinstance(node, dict):
            return _portable_value(node, where, known)
        key = "path" if where == "clip" else next((k for k in _KEYS if k in node), _KEYS[0])
        place = (node.get(key), node.get("checkpoint"))
        rest = {k: located(v, f"{where}.{k}" if where else k) for k, v in node.items()}
        if place in places:
            rest = {k: v for k, v in rest.items() if k not in ("checkpoint", "quick_gelu")}
            rest[key] = f"../{places[place]}"
        return rest

    config = located(run.located, "")
    config |= {"run": config.get("name") or run.path.name}
    return {key: value for key, value in config.items() if key not in ("start", "teacher", "few")}


def _portable_value(value: Any, where: str, known: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    if where.startswith("data.") and (PLACES.fullmatch(where) or where.startswith("data.urls")):
        return _MISSING
    if where == "embeddings":
        return _MISSING
    if PLACES.fullmatch(where) or value.startswith(("/", "~")):
        folder = known.get(str(Path(value).resolve()))
        return f"../{folder}" if folder else Path(value).name
    return value
