"""The job that makes a set of pictures: one for each (prompt, image), by whoever is there to help.

Picture (i, k) draws by the sample number of `sample_number(i, k)` and nothing else. Work is done by
blocks of `batch` pictures that depend on neither shards nor resumptions, so that these change no
bit of a picture. A picture is whole or not there; what is there is passed over. A manifest, written
first, holds all that the pictures depend on, and other settings are refused.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from cascade.data.claims import Claims
from cascade.data.listing import one_line
from cascade.errors import Failed, UserError
from cascade.eval import captions, prompts
from cascade.eval.identity import changed
from cascade.eval.prompts import LAYOUTS, Layout, Prompt
from cascade.eval.sets import listed
from cascade.files import REST, remove, remove_rests, write_atomically
from cascade.grids import to_uint8
from cascade.pipeline import Cascade

MANIFEST = "manifest.json"
MANY = 2**16  # pictures of a prompt

_BEGIN, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


class Item(NamedTuple):
    """A picture to make."""

    id: str
    prompt: int
    image: int


def sample_number(prompt: int, image: int) -> int:
    """By which a picture draws; pictures per prompt, and prompts that are added, change none."""
    return MANY * prompt + image


@dataclass(frozen=True)
class Job:
    """What is to be made, and where.

    Args:
        batch: pictures in a block. Another one changes pictures by rounding, so it is kept.

    Raises:
        UserError: a number is out of range, or the layout cannot hold the prompts.
    """

    out: Path
    prompts: Sequence[Prompt]
    layout: Layout
    per_prompt: int
    seed: int = 0
    batch: int = 16

    def __post_init__(self):
        if not 1 <= self.per_prompt < MANY or self.batch < 1 or self.seed < 0:
            raise UserError("--per-prompt and --batch are at least 1, and --seed is at least 0")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file: give a folder to write to")
        _ = self.items

    @cached_property
    def ids(self) -> list[list[str]]:
        """By prompt."""
        return self.layout.ids(self.prompts, self.per_prompt)

    @cached_property
    def items(self) -> list[Item]:
        return [Item(name, i, k) for i, row in enumerate(self.ids) for k, name in enumerate(row)]

    @property
    def rows(self) -> list[captions.Row]:
        """What captions.jsonl says of each picture."""
        return [
            {"id": name, "caption": one_line(self.prompts[i].text), "prompt": i, "image": k}
            | self.prompts[i].categories
            for name, i, k in self.items
        ]

    def settings(self, model: Mapping[str, Any], size: int) -> dict[str, Any]:
        """All that the pictures depend on, as the manifest has it."""
        return {
            "model": dict(model),
            "prompts": {"hash": prompts.hash_of(self.prompts), "count": len(self.prompts)},
            "layout": self.layout.name,
            "per_prompt": self.per_prompt,
            "count": len(self.items),
            "size": size,
            "seed": self.seed,
            "batch": self.batch,
            "captions": captions.hash_of(self.rows),
        }


def generate(
    cascade: Cascade,
    job: Job,
    model: Mapping[str, Any],
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Makes this shard's pictures that are not there; the last shard finishes the layout.

    Args:
        model: what `described` says of the cascade, and whatever else identifies it.
        progress: called with (pictures made, pictures to make).

    Returns:
        How many pictures are still missing, which are other shards'.

    Raises:
        UserError: the folder holds pictures of other settings, or foreign ones.
        Failed: a picture is not finite.
    """
    size = int(cascade.stages[-1].writes.removeprefix("image_"))
    _settle(job, job.settings(model, size))
    starts = range(0, len(job.items), job.batch)
    blocks = [job.items[i : i + job.batch] for i in starts][shard[0] :: shard[1]]
    todo = [[item for item in block if not _whole(_path(job.out, item.id))] for block in blocks]
    total, done = sum(map(len, todo)), 0
    for block, missing in zip(blocks, todo):
        if not missing:
            continue
        pictures = _painted(cascade, job, block)
        for item, picture in zip(block, pictures):
            if item in missing:
                _save(job.out, item, picture)
        done += len(missing)
        if progress:
            progress(done, total)
    missing = sum(not _whole(_path(job.out, item.id)) for item in job.items)
    if not missing:
        with Claims(job.out) as claims, claims.held("manifest", wait=True):
            for folder in {_path(job.out, item.id).parent for item in job.items}:
                remove_rests(folder)
            job.layout.finish(job.out, job.prompts, job.ids)
        check(job.out)
    return missing


class Made(NamedTuple):
    """A folder that holds exactly the pictures that were asked for.

    Attributes:
        ids: of the pictures.
        protocol: how they were made, by the names of `eval.record.Record`.
    """

    ids: set[str]
    protocol: dict[str, Any]


def generated(folder: Path) -> bool:
    """Whether a folder has a manifest of such a job, and not of something else."""
    return (folder / MANIFEST).is_file() and "per_prompt" in read_manifest(folder)


def check(folder: Path) -> Made:
    """What was generated into a folder, when all of it is there.

    Raises:
        UserError: pictures are missing, there are foreign ones (each said with one's name), or the
            captions are not those of the manifest.
    """
    manifest, rows = read_manifest(folder), captions.rows_of(folder / captions.CAPTIONS)
    try:
        same = captions.hash_of(rows) == manifest["captions"]
        sheets = LAYOUTS[manifest["layout"]].sheets(manifest["prompts"]["count"])
        protocol = _protocol(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: generate into a new folder") from error
    if not same:
        raise UserError(f"{folder / captions.CAPTIONS} was changed: generate into a new folder")
    asked, there = {row["id"] for row in rows}, listed(folder).pictures.keys()
    if missing := asked - there:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(asked)} pictures, such as {min(missing)}: "
            "the command that makes them goes on with the rest"
        )
    if foreign := there - asked - sheets:
        raise UserError(
            f"{folder} holds {len(foreign)} pictures that it was not asked for, such as "
            f"{min(foreign)}: take them out"
        )
    return Made(asked, protocol)


def _protocol(manifest: Mapping[str, Any]) -> dict[str, Any]:
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError if there is none, or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} has no {MANIFEST} that can be read: generate anew") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: generate into a new folder")
    return manifest


def _settle(job: Job, settings: dict[str, Any]) -> None:
    """Writes captions and manifest, or compares with what is there."""
    with Claims(job.out) as claims, claims.held("manifest", wait=True):
        if (job.out / MANIFEST).exists():
            if other := changed(read_manifest(job.out), settings):
                raise UserError(
                    f"{job.out} was generated with other settings ({other[0]}): choose another "
                    "--out, or remove that folder"
                )
            return
        if listed(job.out).pictures:
            raise UserError(f"{job.out} holds pictures of something else: choose another --out")
        lines = "".join(json.dumps(row) + "\n" for row in job.rows)
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(job.out / captions.CAPTIONS, lambda path: path.write_text(lines))
        write_atomically(job.out / MANIFEST, lambda path: path.write_text(text))


@torch.inference_mode()
def _painted(cascade: Cascade, job: Job, block: Sequence[Item]) -> UInt8[np.ndarray, "b h w 3"]:
    batch = {
        "caption": [job.prompts[item.prompt].text for item in block],
        "sample": torch.tensor([sample_number(item.prompt, item.image) for item in block]),
    }
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        pictures = cascade(batch, job.seed)[cascade.stages[-1].writes]
    if bad := [item.id for item, x in zip(block, pictures) if not x.isfinite().all()]:
        raise Failed(f"{bad[0]} is not finite: look at the weights, or at the guidance scale")
    return to_uint8(pictures)


def _path(out: Path, name: str) -> Path:
    return out / f"{name}.png"


def _save(out: Path, item: Item, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    path = _path(out, item.id)
    # A prompt may be as long as a name can be, and leave no room for more.
    beside = path.with_name(f".{sample_number(*item[1:])}.{os.getpid()}{REST}")
    try:
        write_atomically(beside, partial(Image.fromarray(picture).save, format="PNG"))
        os.replace(beside, path)
    finally:
        remove(beside)


def _whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(len(_BEGIN))
            file.seek(-len(_END), os.SEEK_END)
            return begin == _BEGIN and file.read() == _END
    except OSError:
        return False
