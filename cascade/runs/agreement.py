"""Whether the stages of a cascade, and the embeddings given to them, are of one CLIP.

Embeddings of another CLIP, or raw ones in place of those of unit norm, would be read without an
error and mean something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.weights import NotHere
from cascade.errors import UserError
from cascade.runs.run import Run
from cascade.stage import Stage

KEY = "clip_image"
_KINDS = {True: "unit-norm", False: "raw"}


def is_unit(stage: Stage) -> bool | None:
    """Whether a stage reads and writes CLIP embeddings of unit norm; None: it uses none.

    Raises:
        UserError: its parts differ in that.
    """
    found = {
        f"the condition {name}": embedder.unit
        for name, embedder in stage.conditioner.embedders.items()
        if hasattr(embedder, "unit")
    }
    if stage.writes == KEY:
        found["the codec"] = getattr(stage.codec, "unit", True)
    for encoder in stage.encoders:
        if hasattr(encoder, "unit") and "clip_text" in stage.conditioner.reads:
            found[encoder.name] = encoder.unit
    if len(set(found.values())) > 1:
        told = ", but ".join(f"{who} has {_KINDS[unit]} ones" for who, unit in found.items())
        raise UserError(f"{stage.writes}: {told}: set unit of all CLIP embeddings alike")
    return next(iter(found.values()), None)


def check_rows(wanted: bool, rows: Float[Tensor, "n d"], where: object) -> None:
    """Raises UserError if embeddings have unit norm and a stage takes raw ones, or vice versa.

    Args:
        wanted: whether it takes those of unit norm.
    """
    unit = bool((rows.float().norm(dim=1) - 1).abs().max() < 1e-2)
    if unit != wanted:
        flag = "" if wanted else " --raw"
        raise UserError(
            f"{where} holds {_KINDS[unit]} embeddings, but a stage takes {_KINDS[wanted]} ones: "
            f"run `cascade data precompute{flag}` into another folder"
        )


def check_links(stages: Mapping[str, tuple[Run, Any]]) -> None:
    """Checks that stages fit their encoders, and agree about the CLIP embedding that one writes.

    Args:
        stages: by name, in the order of sampling, with their runs.

    Raises:
        UserError: they differ in size, normalisation, or CLIP.
    """
    writer: tuple[str, Run, Stage] | None = None
    for name, (run, stage) in stages.items():
        if not isinstance(stage, Stage):
            continue
        is_unit(stage)
        _check_encoders(name, stage)
        if writer is not None and KEY in stage.conditioner.reads:
            _check(writer, (name, run, stage))
        if stage.writes == KEY:
            writer = name, run, stage


def _check_encoders(name: str, stage: Stage) -> None:
    """Raises UserError if a stage reads embeddings or states of another size than its encoders'."""
    wanted = stage.conditioner.sizes
    for encoder in stage.encoders:
        for key in sorted(wanted.keys() & encoder.sizes.keys()):
            if (found := encoder.sizes[key]) != wanted[key]:
                raise UserError(
                    f"{name} reads {key} of {wanted[key]} numbers, and that of {encoder.name} has "
                    f"{found}: give the encoder that it was trained with"
                )


def _check(writer: tuple[str, Run, Stage], reader: tuple[str, Run, Stage]) -> None:
    own, other = writer[2], reader[2]
    size, wanted = own.codec.size, other.conditioner.sizes[KEY]
    if size != wanted:
        raise UserError(
            f"{writer[0]} writes embeddings of {size} numbers, and {reader[0]} reads {wanted}: "
            "take stages of one CLIP"
        )
    if (unit := is_unit(own)) != (takes := is_unit(other)):
        raise UserError(
            f"{writer[0]} writes {_KINDS[unit]} embeddings, and {reader[0]} reads {_KINDS[takes]} "
            "ones: take stages of one CLIP"
        )
    first, second = (_clip(run) for _, run, _ in (writer, reader))
    if first is None or second is None or _same(first, second):
        return
    raise UserError(
        f"{writer[0]} writes embeddings of the CLIP {_named(first)}, and {reader[0]} reads those "
        f"of {_named(second)}: take stages of one CLIP"
    )


def _clip(run: Run) -> FrozenCLIP | None:
    """The CLIP of a run; if the run was moved, that next to it."""
    clip = run.config.get("clip") or {}
    if not (path := clip.get("path")):
        return None
    moved = run.path.parent / Path(path).name
    path = path if Path(path).exists() or not moved.is_dir() else str(moved)
    return FrozenCLIP(path, clip.get("checkpoint"), clip.get("quick_gelu"), clip.get("unit", True))


def _same(first: FrozenCLIP, second: FrozenCLIP) -> bool:
    """Whether two CLIPs have one name, or else one hash. What is not here counts as the same."""
    if _named(first) == _named(second):
        return True
    try:
        return first.hash == second.hash
    except NotHere:
        # Two published names are two CLIPs, but a directory that is not here may be either's.
        return any("/" in clip.name for clip in (first, second))


def _named(clip: FrozenCLIP) -> str:
    return f"{clip.name} ({clip.checkpoint})" if clip.checkpoint else clip.name
