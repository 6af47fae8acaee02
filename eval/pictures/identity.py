"""The identity of a cascade in JSON: the weights and sampling choices that pictures depend on.

The manifest of a folder of generated pictures holds it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from cascade.encoders.identity import formerly
from cascade.encoders.weights import tensors_hash
from cascade.errors import UserError
from cascade.pipeline import Cascade, TextEmbedding

MANIFEST = "manifest.json"


def identity(cascade: Cascade, out: Path) -> dict[str, Any]:
    """What the pictures of a folder depend on; noted as the version noted it that began it."""
    now, then = (
        {"weights": "EMA", **described(cascade, of)} for of in (attrgetter("hash"), formerly)
    )
    begun = (out / MANIFEST).is_file() and read_manifest(out).get("model") == then
    return then if begun else now


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError if there is none, or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} has no {MANIFEST} that can be read: generate again") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: generate into a new folder")
    return manifest


def protocol_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the pictures of a manifest were generated, as fields of a `record.Record`."""
    model = manifest["model"]
    samplers = {k: stage["sampler"] for k, stage in model["stages"].items() if "sampler" in stage}
    return {
        "guidance": {k: s["scale"] for k, s in samplers.items() if "scale" in s},
        "steps": {k: s["steps"] for k, s in samplers.items() if "steps" in s},
        "weights": model["weights"],
        "model_hash": model["hash"],
        "prompts_hash": manifest["prompts"]["hash"],
        "seed": manifest["seed"],
    }


def described(
    cascade: Cascade, hash_of: Callable[[Any], str] = attrgetter("hash")
) -> dict[str, Any]:
    """Weights and sampling choices of each stage by the key that it writes, and a hash of all.

    Args:
        hash_of: gives the hash of an encoder.
    """
    stages = {link.writes: _link(link, hash_of) for link in cascade.stages}
    text = json.dumps(stages, sort_keys=True)
    return {"stages": stages, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _link(link: Any, hash_of: Callable[[Any], str]) -> dict[str, Any]:
    if isinstance(link, TextEmbedding):  # uses only the stage's encoders
        encoders = [hash_of(encoder) for encoder in link.stage.encoders]
        return {"instead": link.by, "encoders": encoders}
    if is_dataclass(link):  # BestOf, Without
        more = {f.name: _plain(getattr(link, f.name)) for f in fields(link) if f.name != "stage"}
        name = {"Without": "Untold"}.get(type(link).__name__, type(link).__name__)  # in older files
        return {**_link(link.stage, hash_of), name: more}
    return {
        "weights": _hash(link, hash_of),
        "sampler": _plain(link.sampler),
        "process": _plain(link.process),
        "corruption": _plain(link.corruption),
        "weaker": link.weaker and _hash(link.weaker, hash_of),
    }


def _hash(stage: Any, hash_of: Callable[[Any], str]) -> str:
    encoders = json.dumps([hash_of(encoder) for encoder in stage.encoders]).encode()
    return tensors_hash(stage.state_dict(), encoders)


def _plain(value: Any) -> Any:
    """A sampling choice as JSON: functions and classes by name, with their arguments."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, partial):
        named = {k: _plain(v) for k, v in value.keywords.items()}
        return {"name": _plain(value.func), "args": _plain(value.args), **named}
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"name": type(value).__qualname__, **named}
    return getattr(value, "__qualname__", type(value).__qualname__)


def changed(old: Any, new: Any, where: str = "") -> list[str]:
    """The differences between two sets of settings, as "a.b: 1 -> 2", in the new one's order."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            line
            for key in keys
            for line in changed(old.get(key), new.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
