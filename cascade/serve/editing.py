"""Edits of visitors' pictures, as `cascade edit` makes them.

Pictures come as bytes, and are decoded by the one reader that is made for hostile files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cascade.edit.canvas import Canvas
from cascade.encoders import phrases
from cascade.errors import UserError
from cascade.formats.rgb import CONVERTIBLE, MAX_PIXELS, BadSample, picture
from cascade.grids import to_uint8
from cascade.runs.editing import Way, Work, check_context, enlarged, partly
from cascade.runs.model import captions_asked
from cascade.serve.asked import Editing
from cascade.serve.engine import BATCH, Engine, Progress
from cascade.serve.line import Job
from cascade.serve.places import EDITS

MOST_PIXELS = 4_000_000  # of a canvas to paint on, which is sent back whole
STRETCHED = 4  # times as long as wide that a canvas may be

Picture = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True)
class Edited:
    """What was made: rows of pictures, which are the frames of a path in `PATHS`.

    Attributes:
        shares: of each frame.
        choices: how each stage is sampled, by its name.
    """

    asked: Editing
    rows: Sequence[Sequence[Picture]]
    shares: Sequence[float]
    choices: Mapping[str, Mapping[str, Any]]


def edit(engine: Engine, asked: Editing, job: Job) -> Edited:
    """Edit pictures.

    Raises:
        UserError: the model cannot do this, a picture cannot be read, or a limit is exceeded.
        Cancelled: as of `Job.report`.
    """
    if asked.kind not in asked.place.edits:
        raise UserError(f"{asked.place.name} cannot {EDITS.get(asked.kind, 'do this')}")
    limits, to = engine.limits, [asked.options.get("to", ""), asked.options.get("from", "")]
    texts = [text for text in (asked.caption, *to) if text]
    limits.check_captions(texts)
    frames = int(asked.options.get("frames", 1))
    limits.check_count(asked.n * frames)
    given = captions_asked([asked.caption]) if asked.caption else phrases.asked([""], None, False)
    canvases = canvases_of(asked)
    cascade, choices = engine.store.loaded(asked.place, asked.sets)
    engine.check_steps(cascade)
    check_context(cascade, texts)
    each = {key: of * len(canvases) for key, of in given.items()}
    captions = each.pop("caption")
    progress = Progress(cascade, asked.n * frames, job)
    work = Work(cascade, canvases, captions, asked.n, asked.seed, BATCH, False, each, progress)
    way = Way(steps=int(asked.options.get("steps", 1)), captioned=bool(asked.caption))
    limits.check_steps(way.steps, asked.kind)
    made = _KINDS[asked.kind](work, asked, frames, way)
    if isinstance(made, list):
        rows = [[one] for one in made]
    else:
        flat = to_uint8(made.flatten(0, 1))
        rows = [list(flat[i : i + frames]) for i in range(0, len(flat), frames)]
    most = float(asked.options.get("share", 1.0))
    return Edited(asked, rows, np.linspace(0, most, frames).tolist(), choices)


_KINDS: dict[str, Callable[[Work, Editing, int, Way], Any]] = {
    "vary": lambda work, asked, frames, way: work.varied(asked.options.get("eta"), way),
    "interpolate": lambda work, asked, frames, way: work.interpolated(frames, way=way),
    "change": lambda work, asked, frames, way: work.changed(
        [asked.options.get("from", "")],
        [asked.options["to"]],
        np.linspace(0, asked.options["share"], frames).tolist(),
        way,
    ),
    "inpaint": lambda work, asked, frames, way: work.repainted(False, asked.options["jumps"]),
    "outpaint": lambda work, asked, frames, way: work.repainted(True, asked.options["jumps"]),
}


def canvases_of(asked: Editing) -> list[Canvas]:
    """The pictures that a visitor sent, and what of them is to be painted.

    Raises:
        UserError: one is missing, cannot be read, or is too large.
    """
    wanted = 2 if asked.kind == "interpolate" else 1
    if len(asked.pictures) != wanted or not all(asked.pictures):
        raise UserError("choose a picture first" if wanted == 1 else "choose two pictures first")
    pictures = [read(data) for data in asked.pictures]
    if asked.kind not in ("inpaint", "outpaint"):
        return [Canvas.known(one) for one in pictures]
    if not asked.caption.strip():
        raise UserError("say in the caption what the whole picture shows")
    if asked.kind == "inpaint":
        if not asked.mask:
            raise UserError("brush over the part to repaint first")
        mask = read(asked.mask)
        if mask.shape != pictures[0].shape:
            raise UserError("the brush's picture has another size: choose the picture again")
        canvas = partly(pictures[0], mask.mean(2) > 127)
    else:
        sides = [int(asked.options.get(side) or 0) for side in ("left", "right", "top", "bottom")]
        if min(sides) < 0 or not any(sides) or max(sides) > MOST_PIXELS:
            raise UserError("say how many pixels to add, on some side")
        canvas = enlarged(pictures[0], sides)
    short, long = sorted(canvas.unknown.shape)
    if short * long > MOST_PIXELS or long > STRETCHED * short:
        raise UserError(
            f"{long} x {short} pixels: give at most {MOST_PIXELS:,}, and at most {STRETCHED} times "
            "as long as wide"
        )
    return [canvas]


def read(data: bytes) -> Picture:
    """A picture of a visitor. Raises UserError if it is none, or too large."""
    try:
        return picture(data, CONVERTIBLE)
    except BadSample as reason:
        raise UserError(
            f"this file cannot be used ({reason}): choose one of {', '.join(CONVERTIBLE)} with at "
            f"most {MAX_PIXELS:,} pixels"
        ) from None
