"""The allow-list: what a configuration may call.

Configurations come with other people's models, so they are data, not code. A target is admitted by
its real name, the `__module__` and `__qualname__` of the object that it resolves to, so an alias of
anything else is refused. Three rules admit one:

* `PURE` rooms compute and nothing else: each of their public functions and classes.
* `ROOMS` hold what configurations choose among: each of their public classes, because to construct
  one reads and writes no file; their functions may.
* `NAMES`: single names elsewhere.

A user's own module is admitted by `cascade --trust MODULE` alone, never by a configuration.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import accumulate
from types import FunctionType
from typing import Any

from cascade.errors import UserError

PURE = ("cascade.diffusion", "cascade.conditioning")
ROOMS = (
    "cascade.adapters",
    *("cascade.autoregressive", "cascade.codecs", "cascade.encoders", "cascade.losses"),
    *("cascade.latents", "cascade.nets"),
    *("cascade.data.bsr", "cascade.data.conditions", "cascade.data.degradations"),
    "cascade.training.faults",
    "cascade.training.loggers",
)
NAMES = frozenset(
    {
        "cascade.buckets.Buckets",
        "cascade.data.conditions.depth",
        "cascade.data.conditions.edges",
        "cascade.data.conditions.lines",
        "cascade.data.conditions.scribble",
        "cascade.data.conditions.segmentation",
        "cascade.data.degradations.indexed_cosine",
        "cascade.data.embeddings.Embeddings",
        "cascade.data.shards.Shards",
        "cascade.data.stream.Stream",
        "cascade.data.transforms.Pictures",
        "cascade.encoders.published.captions.cleaned",
        "cascade.slurm.batch.Slurm",
        "cascade.slurm.local.Local",
        "cascade.stage.Stage",
        "cascade.stage.warmup_constant",
        "cascade.training.callbacks.averages.PowerAverages",
        "cascade.training.muon.Muon",
        "cascade.training.soap.soap",
        "cascade.stage.warmup_cosine",
        "cascade.training.sharding.replicated",
        "cascade.training.sharding.sharded",
        "hydra.utils.get_method",
        "torch.nn.modules.activation.GELU",
        "torch.optim.Adafactor",
        "torch.optim.adamw.AdamW",
    }
)

_LOOK_UP = "hydra.utils.get_method"  # the one target that names another, in its `path`
_trusted: list[str] = []


def trust(modules: Iterable[str]) -> None:
    """Admits the public classes and functions of a user's own modules, and of no others.

    Args:
        modules: dotted names, from the command line. Each is imported, and so run, once a
            configuration names something in it.
    """
    _trusted[:] = modules


def trusted() -> list[str]:
    """The modules that the command line trusts, so that a launcher can pass them on to its jobs."""
    return list(_trusted)


def check_targets(tree: Any, where: str) -> None:
    """Raises UserError if a resolved configuration calls anything that is not on the allow-list.

    Nothing is called, and only modules of the allow-list are imported.

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
                raise UserError(f"configuration {place!r}: {_LOOK_UP} takes a path alone")
            _admitted(node["path"], f"{place}path")


def check_resolved(tree: Any, where: str) -> None:
    """Raises UserError if a configuration has interpolations: they could read the environment."""
    for place, node in _nodes(tree, where):
        if isinstance(node, str) and "${" in node:
            raise UserError(f"configuration {place!r}: {node!r} must be a value: write it out")


def _nodes(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yields a tree and every node in it, each with its dotted place."""
    yield where, tree
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, node in tree.items() if isinstance(tree, dict) else ():
        yield from _nodes(node, f"{where}.{key}" if where else str(key))


def _admitted(dotted: Any, place: str) -> str:
    """The real name of the object that a dotted name resolves to, if it is on the allow-list."""
    found = _found(dotted.split(".")) if isinstance(dotted, str) else None
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    real = f"{module}.{name}"
    if real in NAMES or _of_a_room(found, module, name):
        return real
    alias = "" if found is None or real == dotted else f", which is {real},"
    raise UserError(
        f"configuration {place!r}: {dotted!r}{alias} is nothing that a configuration may call; if "
        "it is your own code, name its module: cascade --trust MODULE"
    )


def _of_a_room(found: Any, module: Any, name: Any) -> bool:
    """Whether an object is public, defined at the top of its module, and admitted by its room."""
    if not (isinstance(module, str) and isinstance(name, str)):
        return False
    if not name.isidentifier() or name.startswith("_"):
        return False
    if isinstance(found, type):
        return _within(module, (*PURE, *ROOMS, *_trusted))
    return isinstance(found, FunctionType) and _within(module, (*PURE, *_trusted))


def _within(path: str, rooms: Iterable[str]) -> bool:
    return f"{path}.".startswith(tuple(f"{room}." for room in rooms))


def _found(parts: list[str]) -> Any:
    """What Hydra would find under this name, or None if that needs an import outside the rooms.

    Importing a module runs it, and so does asking it for a name that it computes on demand: hence
    the look-up in `__dict__` instead of `getattr`.
    """
    found: Any = None
    if not all(part.isidentifier() for part in parts):
        return None
    for part, path in zip(parts, accumulate(parts, "{}.{}".format)):
        held = getattr(found, "__dict__", {})
        if part in held:
            found = held[part]
        elif _may_import(path):
            try:
                found = import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:  # a dependency is missing, which is not the name's fault
                    raise
                return None
        else:
            return None
    return found


def _may_import(path: str) -> bool:
    """Whether a module is in a room or trusted, or holds, at any depth, a name on the list."""
    rooms = (*PURE, *ROOMS, *_trusted)
    admitted = (*rooms, *(name.rpartition(".")[0] for name in NAMES))
    return _within(path, rooms) or any(_within(module, [path]) for module in admitted)
