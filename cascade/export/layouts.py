"""Checks that a class of diffusers can represent a stage, and refuses settings that none can."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cascade.errors import UserError

COSINE = "cascade.diffusion.noise.cosine_table"  # `squaredcos_cap_v2`
_UNET = "cascade.nets.unet.UNet"
_PRIOR = "cascade.nets.prior.PriorTransformer"
# The parameters of our networks that are represented; of others, their defaults alone.
_REPRESENTED = {
    _UNET: (
        *("channels", "multipliers", "blocks", "embed", "attention", "head_channels", "width"),
        *("image_channels", "dropout", "learned_variance", "strided", "shift_only", "norm"),
        *("level", "checkpoint", "positions", "patch", "pixels", "skip_scale", "cross"),
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


def refused(where: str, setting: str, found: Any, needed: str) -> UserError:
    """The error for a setting that no class of diffusers has."""
    shown = {"None": "null", "True": "true", "False": "false"}.get(str(found), found)
    return UserError(
        f"{where}: {setting}={shown} has no counterpart in diffusers, which needs {needed}; "
        "export it with --format card"
    )


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


def check_process(stage: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The `prediction_type` and `variance_type` of a stage's scheduler.

    Raises:
        UserError: another process than those of unCLIP's pipeline.
    """
    process, variance = stage["process"], "fixed_small_log"
    if str(process["_target_"]).endswith(".LearnedVariance"):
        process, variance = process["mean"], "learned_range"
    if not str(process["_target_"]).endswith(".Diffusion"):
        raise refused(where, "process", process["_target_"], "Diffusion or LearnedVariance")
    schedule = (process.get("schedule") or {}).get("path")
    if schedule != COSINE:
        raise refused(where, "process.schedule", schedule, COSINE)
    prediction = str((process.get("prediction") or {}).get("path")).rpartition(".")[2]
    kinds = {"eps": "epsilon", "x0": "sample"}
    if prediction not in kinds:
        raise refused(where, "process.prediction", prediction, "eps or x0")
    return kinds[prediction], variance
