"""Reads the files of other systems: safetensors, checkpoints of torch, shards, configurations.

Nothing in them is run. Every tensor is read by name, and half precision is widened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from cascade.encoders.weights import NotHere, read_json, reading
from cascade.errors import UserError
from cascade.formats.texts import read

INDEX = ".index.json"  # ends the name of a list of shards
# The weights of diffusers' models, in order of preference.
STEM = "diffusion_pytorch_model"
ENDINGS = (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")
DIFFUSERS = tuple(f"{STEM}{half}{ending}" for half in ("", ".fp16") for ending in ENDINGS)


def first_of(folder: Path, names: Sequence[str], whose: str) -> Path:
    """The first of these files that is in the folder. Raises NotHere if there is none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise NotHere(f"{folder} holds no weights of {whose}: put its {names[0]} there")


def tensors_in(path: Path, whose: str) -> dict[str, Tensor]:
    """The tensors of a file, or of all shards that an index lists, in float32.

    Args:
        path: safetensors, a checkpoint of torch (whose tensors may lie under `state_dict`), or an
            index of either.
        whose: the system, for messages.

    Raises:
        UserError: the file is damaged, would run code, or holds something else; a shard is missing,
            or holds other tensors than the index says.
    """
    return _sharded(path, whose) if path.name.endswith(INDEX) else _of_file(path, whose)


def statistics(path: Path, whose: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, from a checkpoint that holds just these two vectors."""
    found = _loaded(path, whose)
    if not (
        isinstance(found, (tuple, list))
        and len(found) == 2
        and all(isinstance(x, Tensor) and x.ndim == 1 for x in found)
    ):
        raise UserError(f"{path} does not hold a mean and a deviation: fetch {whose}'s again")
    mean, std = (x.float() for x in found)
    return mean, std


def config_in(folder: Path) -> dict[str, Any]:
    """The configuration of a model of diffusers. Raises UserError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise NotHere(f"{folder} holds no config.json: put that of its weights there")
    return read_json(path)


def yaml_in(path: Path) -> dict[str, Any]:
    """A mapping in YAML. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise NotHere(f"{path.parent} holds no {path.name}: put the one of its weights there")
    try:
        found = yaml.safe_load(read(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping of names to values: fetch it again")
    return found


def _sharded(index: Path, whose: str) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index} does not list tensors and their files: fetch it again")
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise UserError(f"{index} lists {name}, which is not there: fetch it")
        own = _of_file(shard, whose)
        wanted = {key for key, place in places.items() if place == name}
        if odd := sorted(wanted ^ own.keys()):
            what = "lacks" if odd[0] in wanted else "has besides"
            raise UserError(f"{shard} {what} {odd[0]}, unlike {index.name} says: fetch both again")
        found |= own
    return found


def _of_file(path: Path, whose: str) -> dict[str, Tensor]:
    found = _loaded(path, whose)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no tensors by name: give the weights of {whose}")
    if odd := [key for key, value in found.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds {odd[0]}, which is no tensor: give the weights of {whose}")
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


def _loaded(path: Path, whose: str) -> Any:
    if not path.is_file():
        raise NotHere(f"{path} is not there: give the weights of {whose}")
    with reading([path], whose):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return torch.load(path, map_location="cpu", weights_only=True)
