"""Generating a set of pictures, one for each (prompt, image), by any number of processes.

The noise of picture (i, k) depends on `sample_number(i, k)` alone. Pictures are generated in blocks
of `batch` that depend on neither the number of shards nor resumptions, so that every bit of a
picture is independent of both. Pictures are written atomically, and existing ones are skipped. A
manifest is written first; it records everything that the pictures depend on, and the folder then
rejects other settings.
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
from PIL.PngImagePlugin import PngInfo

from cascade.batch import Batch, image_size
from cascade.data.loading import on
from cascade.encoders import phrases
from cascade.errors import Failed, UserError
from cascade.eval.pictures import captions, prompts
from cascade.eval.pictures.identity import MANIFEST, changed, protocol_of, read_manifest
from cascade.eval.pictures.prompts import LAYOUTS, Layout, Prompt
from cascade.eval.pictures.sets import listed
from cascade.files.atomic import REST, remove, remove_rests, write_atomically
from cascade.files.locks import Claims
from cascade.formats.texts import one_line
from cascade.grids import to_uint8
from cascade.pipeline import Cascade
from cascade.runs.checker import Checker
from cascade.runs.control import Control
from cascade.runs.model import device

MANY = 2**16  # upper bound on pictures per prompt

_BLACK = "matches"  # the text chunk of a picture that was blackened
_BEGIN, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


class Item(NamedTuple):
    """A picture to generate."""

    id: str
    prompt: int
    image: int


def sample_number(prompt: int, image: int) -> int:
    """The number that seeds a picture, whatever prompts or pictures follow."""
    return MANY * prompt + image


@dataclass(frozen=True)
class Job:
    """What to generate, and where.

    Args:
        batch: pictures in a block. It changes pictures by rounding, so the manifest records it.
        negative: what guidance leads away from, instead of from nothing.
        weights: whether the prompts have weighted phrases (`phrases.parsed`).
        checker: blackens pictures that match a concept.
        controls: pictures of conditions, which steer all pictures alike.

    Raises:
        UserError: a number is out of range, or the layout cannot hold the prompts.
    """

    out: Path
    prompts: Sequence[Prompt]
    layout: Layout
    per_prompt: int
    seed: int = 0
    batch: int = 16
    negative: str | None = None
    weights: bool = False
    checker: Checker | None = None
    controls: Sequence[Control] = ()

    def __post_init__(self):
        if not 1 <= self.per_prompt < MANY or self.batch < 1 or self.seed < 0:
            raise UserError("--per-prompt and --batch are at least 1, and --seed is at least 0")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file: give a folder to write to")
        _ = self.items

    @cached_property
    def asked(self) -> Batch:
        """The captions of the prompts, and what goes with them."""
        return phrases.asked([prompt.text for prompt in self.prompts], self.negative, self.weights)

    @cached_property
    def plain(self) -> list[Prompt]:
        """The prompts with their captions, which have no weights, as texts."""
        return [p._replace(text=text) for p, text in zip(self.prompts, self.asked["caption"])]

    @cached_property
    def ids(self) -> list[list[str]]:
        """The ids of each prompt's pictures."""
        return self.layout.ids(self.plain, self.per_prompt)

    @cached_property
    def items(self) -> list[Item]:
        return [Item(name, i, k) for i, row in enumerate(self.ids) for k, name in enumerate(row)]

    @property
    def rows(self) -> list[captions.CaptionRow]:
        """The rows of captions.jsonl."""
        return [
            {"id": name, "caption": one_line(self.plain[i].text), "prompt": i, "image": k}
            | self.prompts[i].kept
            for name, i, k in self.items
        ]

    def settings(self, model: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Everything that the pictures depend on: the content of the manifest."""
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
            **({} if self.negative is None else {"negative": self.negative}),
            **({"weights": True} if self.weights else {}),
            **({"checker": self.checker.identity} if self.checker else {}),
            **({"control": {c.name: c.identity for c in self.controls}} if self.controls else {}),
        }


def generate(
    cascade: Cascade,
    job: Job,
    model: Mapping[str, Any],
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Generates the missing pictures of a shard; the last shard completes the layout.

    Args:
        model: identifies the cascade (`identity.described`).
        progress: called with (pictures generated, pictures to generate).

    Returns:
        The number of pictures that other shards still have to generate.

    Raises:
        UserError: the folder has pictures of other settings, or unrelated ones.
        Failed: a picture is not finite.
    """
    size = image_size(cascade.stages[-1].writes)
    _settle(job, job.settings(model, size))
    starts = range(0, len(job.items), job.batch)
    blocks = [job.items[i : i + job.batch] for i in starts][shard[0] :: shard[1]]
    todo = [[item for item in block if not _whole(_path(job.out, item.id))] for block in blocks]
    total, done = sum(map(len, todo)), 0
    for block, missing in zip(blocks, todo):
        if not missing:
            continue
        pictures = _painted(cascade, job, block)
        matched: Sequence[str | None] = [None] * len(block)
        if job.checker:
            pictures, matched = job.checker.blackened(pictures)
        for item, picture, concept in zip(block, pictures, matched):
            if item in missing:
                _save(job.out, item, picture, concept)
        done += len(missing)
        if progress:
            progress(done, total)
    missing = sum(not _whole(_path(job.out, item.id)) for item in job.items)
    if not missing:
        with Claims(job.out) as claims, claims.held("manifest", wait=True):
            for folder in {_path(job.out, item.id).parent for item in job.items}:
                remove_rests(folder)
            job.layout.finish(job.out, job.plain, job.ids)
        check(job.out)
    return missing


class Made(NamedTuple):
    """A complete generated folder.

    Attributes:
        ids: of the pictures.
        protocol: how they were generated, as fields of a `record.Record`.
    """

    ids: set[str]
    protocol: dict[str, Any]


def generated(folder: Path) -> bool:
    """Whether a folder has the manifest of a generation."""
    return (folder / MANIFEST).is_file() and "per_prompt" in read_manifest(folder)


def check(folder: Path) -> Made:
    """The content of a generated folder.

    Raises:
        UserError: pictures are missing or do not belong to it (one is named), or the captions
            differ from the manifest's.
    """
    manifest, rows = read_manifest(folder), captions.rows_of(folder / captions.CAPTIONS)
    try:
        same = captions.hash_of(rows) == manifest["captions"]
        sheets = LAYOUTS[manifest["layout"]].sheets(manifest["prompts"]["count"])
        protocol = protocol_of(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: generate into a new folder") from error
    if not same:
        raise UserError(f"{folder / captions.CAPTIONS} was changed: generate into a new folder")
    asked, there = {row["id"] for row in rows}, listed(folder).pictures.keys()
    if missing := asked - there:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(asked)} pictures, such as {min(missing)}: "
            "run the command that generates them again"
        )
    if foreign := there - asked - sheets:
        raise UserError(
            f"{folder} holds {len(foreign)} pictures that were not generated, such as "
            f"{min(foreign)}: remove them"
        )
    return Made(asked, protocol)


def _settle(job: Job, settings: dict[str, Any]) -> None:
    """Writes captions and manifest, or compares the settings to an existing manifest."""
    with Claims(job.out) as claims, claims.held("manifest", wait=True):
        if (job.out / MANIFEST).exists():
            if other := changed(read_manifest(job.out), settings):
                raise UserError(
                    f"{job.out} was generated with other settings ({other[0]}): choose another "
                    "--out, or remove that folder"
                )
            return
        if listed(job.out).pictures:
            raise UserError(f"{job.out} holds other pictures: choose another --out")
        lines = "".join(json.dumps(row) + "\n" for row in job.rows)
        text = json.dumps(settings, indent=2) + "\n"
        write_atomically(job.out / captions.CAPTIONS, lambda path: path.write_text(lines))
        write_atomically(job.out / MANIFEST, lambda path: path.write_text(text))


@torch.inference_mode()
def _painted(cascade: Cascade, job: Job, block: Sequence[Item]) -> UInt8[np.ndarray, "b h w 3"]:
    batch = {key: [of[item.prompt] for item in block] for key, of in job.asked.items()}
    batch["sample"] = torch.tensor([sample_number(item.prompt, item.image) for item in block])
    for control in job.controls:
        batch |= on(control.rows(len(block)), device())
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
        pictures = cascade(batch, job.seed)[cascade.stages[-1].writes]
    if bad := [item.id for item, x in zip(block, pictures) if not x.isfinite().all()]:
        raise Failed(f"{bad[0]} is not finite: check the weights and the guidance scale")
    return to_uint8(pictures)


def _path(out: Path, name: str) -> Path:
    return out / f"{name}.png"


def blackened(job: Job) -> int:
    """The number of pictures that the checker blackened, which each of them records."""
    paths = [_path(job.out, item.id) for item in job.items]
    return sum(_BLACK in Image.open(path, formats=("PNG",)).info for path in paths)


def _save(
    out: Path, item: Item, picture: UInt8[np.ndarray, "h w 3"], concept: str | None = None
) -> None:
    """Writes a picture; one that was blackened records the concept that it matches."""
    about = PngInfo()
    if concept is not None:
        about.add_itxt(_BLACK, concept)
    path = _path(out, item.id)
    # A name may already have the greatest length, so the temporary name cannot extend it.
    beside = path.with_name(f".{sample_number(*item[1:])}.{os.getpid()}{REST}")
    try:
        image = Image.fromarray(picture)
        write_atomically(beside, partial(image.save, format="PNG", pnginfo=about))
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
