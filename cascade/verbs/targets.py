"""What a configuration may call: the only list, and the gate that holds it up.

Configurations come with other people's models, so they are data. A target is admitted by the real
name, `__module__` and `__qualname__`, of what it leads to: aliases of anything else are refused.
"""

from collections.abc import Iterator
from importlib import import_module
from itertools import accumulate
from typing import Any

from cascade.errors import UserError

# What conf/ calls, and the choices that only a command line makes. A class of yours: add a line.
TARGETS = frozenset(
    {
        "cascade.autoregressive.Autoregressive",
        "cascade.autoregressive.TokenSampler",
        "cascade.codecs.Embedding",
        "cascade.codecs.Pixels",
        "cascade.codecs.Tokens",
        "cascade.conditioning.Conditioner",
        "cascade.conditioning.LowRes",
        "cascade.conditioning.Sequence",
        "cascade.conditioning.Vector",
        "cascade.conditioning.mean",
        "cascade.data.bsr.BSR",
        "cascade.data.degradations.Blur",
        "cascade.data.degradations.Corruption",
        "cascade.data.degradations.indexed_cosine",
        "cascade.data.embeddings.Embeddings",
        "cascade.data.shards.Shards",
        "cascade.data.stream.Stream",
        "cascade.data.transforms.Pictures",
        "cascade.diffusion.analytic.AnalyticVariance",
        "cascade.diffusion.gaussian.Diffusion",
        "cascade.diffusion.guidance.dynamic_threshold",
        "cascade.diffusion.guidance.rescale",
        "cascade.diffusion.guidance.static_threshold",
        "cascade.diffusion.learned_variance.LearnedVariance",
        "cascade.diffusion.noise.cosine",
        "cascade.diffusion.noise.cosine_logsnr",
        "cascade.diffusion.noise.cosine_table",
        "cascade.diffusion.noise.linear_table",
        "cascade.diffusion.noise.lognormal",
        "cascade.diffusion.noise.scaled_linear_table",
        "cascade.diffusion.prediction.eps",
        "cascade.diffusion.prediction.flow",
        "cascade.diffusion.prediction.v",
        "cascade.diffusion.prediction.x0",
        "cascade.diffusion.sampling.DiffusionSampler",
        "cascade.diffusion.solvers.ancestral",
        "cascade.diffusion.solvers.ddim",
        "cascade.diffusion.solvers.dpmpp_2m",
        "cascade.diffusion.solvers.heun",
        "cascade.diffusion.spacing.fast27",
        "cascade.diffusion.spacing.karras",
        "cascade.diffusion.spacing.sections",
        "cascade.diffusion.spacing.strided",
        "cascade.diffusion.weighting.clipped_v",
        "cascade.diffusion.weighting.min_snr",
        "cascade.encoders.architecture.Architecture",
        "cascade.encoders.clip.CLIPTraining",
        "cascade.encoders.clip.FrozenCLIP",
        "cascade.encoders.pooling.AttentionPool",
        "cascade.encoders.sam.SAM",
        "cascade.encoders.text.FrozenT5",
        "cascade.encoders.text.TextTransformer",
        "cascade.encoders.text.Tokenizer",
        "cascade.nets.ar.TokenTransformer",
        "cascade.nets.efficient_unet.EfficientUNet",
        "cascade.nets.layers.GroupNorm",
        "cascade.nets.layers.Timestep",
        "cascade.nets.prior.PriorTransformer",
        "cascade.nets.sketch.Sketch",
        "cascade.nets.unet.Residual",
        "cascade.nets.unet.UNet",
        "cascade.slurm.batch.Slurm",
        "cascade.slurm.local.Local",
        "cascade.stage.Stage",
        "cascade.stage.warmup_constant",
        "cascade.stage.warmup_cosine",
        "cascade.training.faults.Crash",
        "cascade.training.faults.DeadWorker",
        "cascade.training.faults.FlippedByte",
        "cascade.training.faults.FullDisk",
        "cascade.training.faults.Gradient",
        "cascade.training.faults.Hang",
        "cascade.training.faults.KilledSave",
        "cascade.training.faults.Loss",
        "cascade.training.faults.Signal",
        "cascade.training.sharding.replicated",
        "cascade.training.sharding.sharded",
        "hydra.utils.get_method",
        "torch.optim.Adafactor",
        "torch.optim.adamw.AdamW",
    }
)

_LOOK_UP = "hydra.utils.get_method"  # the one target that names another, in its `path`
_MODULES = {path for name in TARGETS for path in accumulate(name.split(".")[:-1], "{}.{}".format)}


def check_targets(tree: Any, where: str) -> None:
    """Raises UserError if a resolved configuration calls what is not in `TARGETS`.

    Nothing is called, and no module is imported but those of `TARGETS`.

    Args:
        tree: plain dictionaries, lists and values.
        where: the dotted place of the tree, for the message.
    """
    check_resolved(tree, where)
    for place, node in _nodes(tree, where):
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        place = f"{place}." if place else ""
        if _admitted(node["_target_"], f"{place}_target_") == _LOOK_UP:
            if node.keys() != {"_target_", "path"}:
                raise UserError(f"configuration {place!r}: {_LOOK_UP} takes a path and no more")
            _admitted(node["path"], f"{place}path")


def check_resolved(tree: Any, where: str) -> None:
    """Raises UserError if a configuration has interpolations: they read the environment."""
    for place, node in _nodes(tree, where):
        if isinstance(node, str) and "${" in node:
            raise UserError(f"configuration {place!r}: {node!r} must be a value: write it out")


def _nodes(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    """A tree and all that is in it, each with its dotted place."""
    yield where, tree
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, node in tree.items() if isinstance(tree, dict) else ():
        yield from _nodes(node, f"{where}.{key}" if where else str(key))


def _admitted(dotted: Any, place: str) -> str:
    """The real name of what a dotted name leads to; it is in `TARGETS`."""
    found = _found(dotted.split(".")) if isinstance(dotted, str) else None
    real = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if real in TARGETS:
        return real
    alias = "" if found is None or real == dotted else f", which is {real},"
    raise UserError(
        f"configuration {place!r}: {dotted!r}{alias} is nothing that a configuration may call; if "
        "you trust it, add a line to cascade/verbs/targets.py"
    )


def _found(parts: list[str]) -> Any:
    """What Hydra finds by this name, unless it would import or compute something new: then None.

    To import a module is to run it, and so it is to ask one for a name that it makes up on demand.
    """
    found: Any = None
    for part, path in zip(parts, accumulate(parts, "{}.{}".format)):
        held = getattr(found, "__dict__", {})
        if part not in held and path not in _MODULES:
            return None
        found = held[part] if part in held else import_module(path)
    return found
