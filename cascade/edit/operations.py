"""The edits: functions of a cascade and a batch, which return the batch with the new pictures.

A batch holds `caption` and `sample`; `known/image_{size}` [b, 3, h, w] is the picture to edit as a
stage sees it, and `unknown/image_{size}` [b, 1, h, w] what of it to paint (`canvas`). Draws depend
only on the seed, the stage and the number of a sample.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cascade.batch import Batch, image_size
from cascade.diffusion.distillation import Distilled
from cascade.edit import inversion
from cascade.edit.known import from_picture, repaint
from cascade.edit.windows import Enlarged, Windows
from cascade.errors import UserError
from cascade.pipeline import Cascade, Link, Progress, Without, altered, innermost, watching
from cascade.stage import Stage

KNOWN, UNKNOWN = "known/", "unknown/"


def x_T(
    cascade: Cascade, batch: Batch, progress: Progress | None = None, **choices: Any
) -> Float[Tensor, "b *d"]:
    """The noise that leads to the picture (`inversion.inverted`), given its `clip_image`."""
    stage = reading_embeddings(cascade)
    picture = {stage.writes: batch[KNOWN + stage.writes]}
    report = progress and watching(stage, progress)
    return inversion.inverted(stage, {**batch, **picture}, progress=report, **choices)


def decode(
    cascade: Cascade, batch: Batch, seed: int, progress: Progress | None = None, **choices: Any
) -> Batch:
    """Paints `x_T` and `clip_image` (`inversion.decoded`).

    Between two pictures' on great circles it interpolates (`slerp`); with `text_difference` it
    changes what the picture shows, and with eta it varies it (unCLIP, sections 3.1 to 3.3).
    """
    stage = reading_embeddings(cascade)
    report = progress and watching(stage, progress)
    base = {stage.writes: inversion.decoded(stage, batch, seed, progress=report, **choices)}
    return cascade({**batch, **base}, seed, progress)


def vary(
    cascade: Cascade,
    batch: Batch,
    seed: int,
    progress: Progress | None = None,
    captioned: bool = False,
) -> Batch:
    """Paints pictures of `clip_image`, from noise of their own; without the caption by default."""
    stage = reading_embeddings(cascade)
    if not captioned:
        cascade = cascade.replace(Without(stage, ("caption",)))
    return cascade(batch, seed, progress)


def image(
    cascade: Cascade,
    batch: Batch,
    seed: int,
    progress: Progress | None = None,
    strength: float = 0.6,
) -> Batch:
    """Noises the picture to u = `strength`, and denoises it with the caption (SDEdit).

    A distilled decoder starts at its nearest level.
    """

    def started(stage: Stage) -> Stage:
        level = stage.process.schedule(torch.tensor(strength, dtype=torch.float64))
        visited = stage.sampler.logsnrs(stage.process)
        if isinstance(stage.process, Distilled):
            level = visited[:-1][(visited[:-1] - level).abs().argmin()]
        level = level.clamp(min=visited[0])
        x0 = stage.codec.encode({stage.writes: batch[KNOWN + stage.writes]})
        solver = from_picture(stage.sampler.solver, x0, level)
        return stage.altered(sampler=replace(stage.sampler, solver=solver))

    return cascade.replace(altered(cascade.painter, started))(batch, seed, progress)


def paint_unknown(
    cascade: Cascade,
    batch: Batch,
    seed: int,
    progress: Progress | None = None,
    jumps: int = 5,
) -> Batch:
    """Paints the unknown part of a picture at every stage, and keeps the rest (RePaint).

    Pictures that exceed a network's own size are painted in windows: so it outpaints.
    """

    def painting(stage: Stage) -> Stage:
        known = batch[KNOWN + stage.writes]
        x0 = stage.codec.encode({stage.writes: known})
        # Latents are smaller than pictures; those of which any pixel is unknown are painted.
        sides, unknown = tuple(x0.shape[2:]), batch[UNKNOWN + stage.writes]
        size = (image_size(stage.writes) or 0) * sides[0] // known.shape[2]
        if sides != tuple(unknown.shape[2:]):
            unknown = F.adaptive_max_pool2d(unknown.float(), sides) > 0
        solver = repaint(stage.sampler.solver, x0, unknown, jumps)
        stage = stage.altered(sampler=replace(stage.sampler, solver=solver))
        if sides == (size, size):
            return stage
        weaker = stage.weaker and stage.weaker.altered(net=Windows(stage.weaker.net, size))
        codec = Enlarged(stage.codec, sides)
        return stage.altered(net=Windows(stage.net, size), codec=codec, weaker=weaker)

    for link in pictured(cascade):
        cascade = cascade.replace(altered(link, painting))
    return cascade(batch, seed, progress)


def pictured(cascade: Cascade) -> list[Link]:
    """The stages that write pictures."""
    return [link for link in cascade.stages if image_size(link.writes)]


def reading_embeddings(cascade: Cascade) -> Stage:
    """The base stage. Raises UserError if it does not read CLIP embeddings of pictures."""
    stage = innermost(cascade.painter)
    if "clip_image" not in stage.reads:
        raise UserError(
            f"the stage that writes {stage.writes} reads no CLIP embedding of a picture: name a "
            "cascade with stage=decoder, or use image, inpaint or outpaint"
        )
    return stage
