"""Fine-tuning: a training that begins with the weights of another run (`start=RUN`).

Without `stage=` or `experiment=`, the other run's configuration is continued as well: what is not
overridden is as in that run. Its configuration is resolved, so the references that overrides rely
on (`optim.lr` reaches the stage's optimizer) are restored first.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from cascade.config.compose import composed
from cascade.config.overrides import parse
from cascade.errors import UserError
from cascade.runs.resumable import replaced
from cascade.runs.run import Run

_GROUPS = (
    *("data", "clip", "text", "net", "process", "sampler", "optim", "learning_rate"),
    *("precomputed", "sketch", "alignment", "perceptual", "averages", "autoencoder", "adversarial"),
    "adapter",
)
_NOT_CONTINUED = ("run", "start", "trainer", "logger", "faults")  # each run has its own
# What refers to what in the configuration of a training, where both have the same value.
_REFERENCES = {
    "learning_rate.warmup": "${warmup}",
    "learning_rate.total": "${images}",
    "embeddings": "${data.path}/embeddings",
    "data.seed": "${seed}",
    "data.embeddings.clip.folder": "${embeddings}",
    "data.recaptions": "${data.path}/captions",
    "data.pictures.crop": "${crop}",
    "stage.clip": "${clip.model}",
    "stage.autoencoder": "${autoencoder.model}",
    "stage.codec.autoencoder.folder": "${autoencoder.path}",
    "stage.net": "${net}",
    "stage.process": "${process}",
    "stage.sampler": "${sampler}",
    "stage.optimizer": "${optim}",
    "stage.learning_rate": "${learning_rate}",
    "stage.batch": "${batch}",
    "stage.seed": "${seed}",
}
_SIZES = ("size", "low", "classes")  # which a network and its data have from the run
_NODE = "continued"  # the name of the other run's configuration among the stages


def training(overrides: Sequence[str]) -> DictConfig:
    """Composes the configuration of a training; with `start=RUN` alone, as a continuation of RUN.

    Raises:
        UserError: as `composed`; the run to begin with has no weights, or is the new run itself;
            another size is asked for without naming the stage.
    """
    given = {one.path: one for one in map(parse, overrides)}
    start = given["start"].text if "start" in given else None
    if not start or start == "null":
        return _uncontrolled(composed("train", overrides))
    run = Run(Path(v if isinstance(v := given["start"].value, str) else start))
    if not run.weights:
        raise UserError(f"start={run.path}: no weights there; give the directory of a trained run")
    if not {"stage", "experiment"} & given.keys():
        sizes = _SIZES if "control" in given else (*_SIZES, "control.size")
        if kept := [name for name in sizes if name in given]:
            raise UserError(
                f"start={run.path} keeps the {kept[0]} of that run: leave {kept[0]}= out, or name "
                "the stage with stage= or experiment="
            )
        node = _continued(run.located, given)
        ConfigStore.instance().store(name=_NODE, node=node, group="stage", package="_global_")
        overrides = [*overrides, f"stage={_NODE}"]
    config = composed("train", overrides)
    if Path(config.run).resolve() == run.path.resolve():
        raise UserError(f"start={run.path} is the run itself: choose another run=...")
    return config


def _uncontrolled(config: DictConfig) -> DictConfig:
    """A configuration without `start`. UserError if it has ControlNets or an adapter."""
    if config.get("adapter"):
        raise UserError("adapter: it changes a trained network: name its run with start=RUN")
    if named := list(config.stage.get("control") or {}):
        raise UserError(f"control={named[0]} steers a trained network: name its run with start=RUN")
    return config


def _continued(config: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A run's configuration as a choice of `stage`, without the groups that are given anew."""
    clip = config["clip"]["path"]
    node = OmegaConf.create(replaced(config, clip, "${clip.path}"))
    node.clip.path = clip
    for path, reference in _REFERENCES.items():
        parent, _, key = path.rpartition(".")
        holder = OmegaConf.select(node, parent) if parent else node
        if holder is None or key not in list(holder):
            continue
        meant = OmegaConf.create({**config, "_": reference})
        # An exported run leaves open what is unknown elsewhere.
        if OmegaConf.is_missing(holder, key) or holder[key] == meant._:
            holder[key] = reference
    kept = [group for group in _GROUPS if group not in given]
    left_out = {*_NOT_CONTINUED, *_GROUPS} - set(kept)
    whole = {k: v for k, v in OmegaConf.to_container(node).items() if k not in left_out}
    return {"defaults": [{f"override /{group}": None} for group in kept], **whole}
