"""Networks in the format of diffusers and transformers; settings that none has are refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from cascade.errors import UserError

VERSION = "0.36.0"  # of diffusers, whose layout this is
_NOISE = "cascade.diffusion.noise."
_TABLES = {"cosine_table": "squaredcos_cap_v2", "linear_table": "linear"}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_UNET = "cascade.nets.unet.UNet"
_PRIOR = "cascade.nets.prior.PriorTransformer"
# The parameters of our networks that are represented; of others, their defaults alone.
_REPRESENTED = {
    _UNET: (
        *("channels", "multipliers", "blocks", "embed", "attention", "head_channels", "heads"),
        *("width", "image_channels", "dropout", "learned_variance", "strided", "shift_only"),
        *("norm", "level", "checkpoint", "positions", "patch", "pixels", "skip_scale", "cross"),
    ),
    _PRIOR: ("size", "width", "layers", "heads", "context", "level", "checkpoint", "skip"),
}
_ONLY = {
    _UNET: {"patch": 1, "pixels": 3, "skip_scale": 1.0, "cross": False},
    _PRIOR: {},
}


class Model(NamedTuple):
    """A network of diffusers or transformers.

    Attributes:
        kind: the name of its class.
        config: the arguments of its class.
        state: its tensors.
    """

    kind: str
    config: dict[str, Any]
    state: dict[str, Tensor]


def refused(where: str, setting: str, found: Any, needed: Any) -> UserError:
    """The error for a setting that no class of diffusers has."""
    return UserError(
        f"{where}: {setting}={_yaml(found)} has no counterpart in diffusers, which needs "
        f"{_yaml(needed)}; export it with --format card"
    )


def _yaml(value: Any) -> Any:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), value)


def check_net(net: Mapping[str, Any], target: str, where: str) -> None:
    """Raises UserError if a network's configuration has what diffusers cannot represent.

    Args:
        net: the configuration of the network.
        target: the class that diffusers has a counterpart of.
        where: the stage, for the message.
    """
    own = str(net.get("_target_"))
    if own != target:
        raise refused(where, "net", own.rpartition(".")[2], target.rpartition(".")[2])
    for key, value in net.items():
        if key in _ONLY[target] and value != _ONLY[target][key]:
            raise refused(where, f"net.{key}", value, f"{_ONLY[target][key]}")
        if not key.startswith("_") and key not in _REPRESENTED[target] and value:
            raise refused(where, f"net.{key}", value, "it to be left out")
    level = net.get("level") or {}
    dim = net["channels"] if target == _UNET else net["width"]
    if not str(level.get("_target_")).endswith(".Timestep"):
        raise refused(where, "net.level", level.get("_target_"), "layers.Timestep")
    if level.get("dim") != dim or level.get("steps", 1000) != 1000:
        raise refused(where, "net.level.dim", level.get("dim"), f"{dim}, and 1000 steps")


def check_process(
    stage: Mapping[str, Any], where: str, tables: Sequence[str] = tuple(_TABLES)
) -> tuple[str, str, str]:
    """The `prediction_type`, `variance_type` and `beta_schedule` of a stage's scheduler.

    Args:
        tables: of `cascade.diffusion.noise`, that the scheduler knows.

    Raises:
        UserError: another process.
    """
    process, variance = stage["process"], "fixed_small_log"
    if str(process["_target_"]).endswith(".LearnedVariance"):
        process, variance = process["mean"], "learned_range"
    if not str(process["_target_"]).endswith(".Diffusion"):
        raise refused(where, "process", process["_target_"], "Diffusion or LearnedVariance")
    schedule = process.get("schedule") or {}
    name = str(schedule.get("path")).removeprefix(_NOISE)
    if name not in tables or schedule.get("steps", 1000) != 1000:
        raise refused(where, "process.schedule", schedule.get("path"), " or ".join(tables))
    prediction = str((process.get("prediction") or {}).get("path")).rpartition(".")[2]
    if prediction not in _PREDICTIONS:
        raise refused(where, "process.prediction", prediction, " or ".join(_PREDICTIONS))
    return _PREDICTIONS[prediction], variance, _TABLES[name]


def write_network(model: Model, folder: Path) -> None:
    """Writes the folder of a network, which `from_pretrained` of its class reads."""
    folder.mkdir()
    of_transformers = "architectures" in model.config
    about = {} if of_transformers else {"_class_name": model.kind, "_diffusers_version": VERSION}
    write_json(folder / "config.json", {**about, **model.config})
    file = "model" if of_transformers else "diffusion_pytorch_model"
    save_file(model.state, folder / f"{file}.safetensors", {"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
