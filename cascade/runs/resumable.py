"""Refuse to resume a run with another configuration."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.config.compose import differences
from cascade.errors import UserError
from cascade.files.stores.places import Place, Remote, place, read_bytes
from cascade.runs.run import Run

# What may change from one start of a run to the next. The totals follow from `images`.
FREE = (
    *(
        "images",
        "run",
        "trainer",
        "logger",
        "workers",
        "grids",
        "micro_batch",
        "faults",
        "watchdog",
    ),
    # Encoders are compared by their hashes.
    *("clip.checkpoint", "clip.quick_gelu", "text.reader.quick_gelu"),
    *("stage.encoders.0.quick_gelu", "stage.encoders.1.quick_gelu"),
    "alignment.teacher.quick_gelu",
    *("learning_rate.total", "stage.learning_rate.total", "data.max_skip_fraction", "data.cache"),
    *("data.cache_gb", "data.index"),
    "data.recaptions",  # compared by its hash
)


# Keys that hold paths: files may move, so their contents are compared
# (`cascade.training.provenance`).
PLACES = re.compile(
    r"(few\.kept|data)\.(path|embeddings\.\w+\.folder)|start|teacher\.run|embeddings|"
    r"clip\.(path|checkpoint)|autoencoder\.path|stage\.codec\.autoencoder\.folder|"
    r"(text\.\w+|alignment\.teacher)\.(path_or_name|checkpoint|folder)|perceptual\.teacher\.file"
)


def check_resumable(config: DictConfig, run: Run) -> None:
    """Raise UserError if a run was started with another configuration.

    Files may have moved, or be named by another path.
    """
    if not run.config_file.exists():
        return
    old, new = (OmegaConf.to_container(c) for c in (run.config, config))
    begun = bool(run.checkpoints())
    for key, before in _places(old):
        if _same_place(before, OmegaConf.select(config, key), begun and key == "data.path"):
            old = replaced(old, before, _plain(OmegaConf.select(config, key)))
    paths = {line: line.split(":")[0] for line in differences(old, new)}
    changed = [d for d, p in paths.items() if not f"{p}.".startswith(tuple(f"{f}." for f in FREE))]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{run.path} was trained with another configuration: {changed[0]}{more}; "
            "choose another run=..., or remove that folder"
        )


def _places(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The paths in a configuration (`PLACES`), with their keys."""
    for key, value in node.items():
        dotted = f"{where}.{key}" if where else str(key)
        if isinstance(value, dict):
            yield from _places(value, dotted)
        elif value is not None and PLACES.fullmatch(dotted):
            yield dotted, value


def _same_place(before: Any, now: Any, compared: bool) -> bool:
    """Whether two paths, or lists of paths, lead to the same content, as far as is known here.

    Args:
        compared: whether the training itself will compare the contents.
    """
    a, b = ([x] if isinstance(x, str) else _plain(x) for x in (before, now))
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return False
    return all(_same_path(place(x), place(y), compared) for x, y in zip(a, b))


def _same_path(before: Place, now: Place, compared: bool) -> bool:
    if _resolved(before) == _resolved(now):
        return True
    if isinstance(now, Path) and not now.exists():
        return False
    gone = isinstance(before, Path) and not before.exists()
    return compared or gone or _marks(before) == _marks(now) != {}


def _resolved(where: Place) -> Place:
    return where if isinstance(where, Remote) else where.resolve()


def _marks(path: Place) -> dict[str, str]:
    """Hashes of the files that identify the weights or the embeddings in a place."""
    if isinstance(path, Remote):
        manifest = path / "manifest.json"
        return {manifest.name: hashlib.sha256(read_bytes(manifest)).hexdigest()}
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
    """A configuration of dictionaries and lists in which one value replaces another."""
    if node == old:
        return new
    if isinstance(node, dict):
        return {key: replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [replaced(value, old, new) for value in node]
    return node
