"""What can be said of a training before anything heavy is imported, by whoever sends it off too."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.data.dataset import read_dataset
from cascade.data.splits import chosen, lacking
from cascade.data.tar import tars_of
from cascade.errors import UserError
from cascade.verbs.configuration import differences, loaded

# What may change between two starts of the same run; the totals follow from `images`.
FREE = (
    *("images", "run", "trainer", "workers", "grids", "micro_batch", "faults", "watchdog"),
    # Of encoders, which are told by their hashes.
    *("clip.checkpoint", "clip.quick_gelu", "text.reader.quick_gelu"),
    *("stage.encoders.0.quick_gelu", "stage.encoders.1.quick_gelu"),
    *("learning_rate.total", "stage.learning_rate.total", "data.max_skip_fraction", "data.cache"),
)


# Keys of paths; what they lead to is known by its content (`cascade.training.surroundings`).
PLACES = re.compile(
    r"data\.path|embeddings|data\.embeddings\.\w+\.folder|clip\.(path|checkpoint)|"
    r"text\.\w+\.(path_or_name|checkpoint)"
)


def check_identity(config: DictConfig, folder: Path) -> None:
    """Raises UserError if a run directory is another configuration's.

    What lies elsewhere now, or is named in another way, is no difference.
    """
    if not (folder / "config.yaml").exists():
        return
    old, new = (OmegaConf.to_container(c) for c in (loaded(folder / "config.yaml"), config))
    begun = any((folder / "checkpoints").glob("step-*"))
    for key, before in _places(old):
        if _same_place(before, OmegaConf.select(config, key), begun and key == "data.path"):
            old = replaced(old, before, _plain(OmegaConf.select(config, key)))
    paths = {line: line.split(":")[0] for line in differences(old, new)}
    changed = [d for d, p in paths.items() if not f"{p}.".startswith(tuple(f"{f}." for f in FREE))]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with another configuration: {changed[0]}{more}; "
            "choose another run=..., or remove that folder"
        )


def _places(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The values of `PLACES` in a configuration, with their keys."""
    for key, value in node.items():
        dotted = f"{where}.{key}" if where else str(key)
        if isinstance(value, dict):
            yield from _places(value, dotted)
        elif value is not None and PLACES.fullmatch(dotted):
            yield dotted, value


def _same_place(before: Any, now: Any, compared: bool) -> bool:
    """Whether two paths, or lists of them, lead to the same, or may after a move.

    Args:
        compared: whether who goes on compares the content of both.
    """
    a, b = ([x] if isinstance(x, str) else _plain(x) for x in (before, now))
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return False
    return all(_same_path(Path(x), Path(y), compared) for x, y in zip(a, b))


def _same_path(before: Path, now: Path, compared: bool) -> bool:
    if before.resolve() == now.resolve():
        return True
    if not now.exists():
        return False
    return compared or not before.exists() or _marks(before) == _marks(now) != {}


def _marks(path: Path) -> dict[str, str]:
    """Digests of what says which weights, or whose embeddings, lie there."""
    if path.is_file():
        return {"": _digest(path)}
    manifest = path / "manifest.json"
    files = [manifest] if manifest.exists() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return {file.name: _digest(file) for file in files}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def replaced(node: Any, old: Any, new: Any) -> Any:
    """A configuration of dictionaries and lists with one value in place of another."""
    if node == old:
        return new
    if isinstance(node, dict):
        return {key: replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(value, old, new) for value in node]
    return node


def check_split(data: Path, split: str) -> None:
    """Raises UserError if shards that are there have no such split."""
    tars = tars_of(data) if data.is_dir() else []
    dataset = read_dataset(data) if tars else None
    shares = {tar.stem: dataset.share(tar.stem) if dataset else 0.0 for tar in tars}
    if tars and not chosen(shares, split)[0]:
        raise lacking(data, list(shares), split)


def shares(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Samples at a time on each rank, and over how many times gradients are accumulated.

    Raises:
        UserError: the batch is not ranks x micro_batch x a whole number.
    """
    micro_batch = micro_batch or max(1, batch // ranks)
    steps, rest = divmod(batch, ranks * micro_batch)
    if rest or not steps:
        raise UserError(
            f"batch={batch} is not ranks ({ranks}) x micro_batch ({micro_batch}) x a whole number: "
            "change batch or micro_batch"
        )
    return micro_batch, steps
