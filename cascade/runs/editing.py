"""Edits with a whole cascade: from users' pictures to batches, and back."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cascade.batch import Batch, image_key, image_size
from cascade.data.embeddings import EMBEDDINGS, Embeddings
from cascade.data.loading import collate
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.draws import Draws
from cascade.edit import operations
from cascade.edit.canvas import Canvas, Frame
from cascade.edit.embeddings import slerp, text_difference
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.text import Tokenizer, exceeds
from cascade.errors import UserError
from cascade.formats.rgb import MAX_PIXELS
from cascade.pipeline import Cascade, Progress, innermost
from cascade.runs.model import encoders_of, in_batches

Paint = Callable[..., Batch]  # one of `operations`


@dataclass(frozen=True)
class Way:
    """How pictures are inverted, and painted again (`edit.inversion`).

    Attributes:
        steps: of DDIM, both ways.
        refine: iterations per inverted step.
        scale: of guidance.
        captioned: whether the stage is told the caption.
    """

    steps: int = 50
    refine: int = 0
    scale: float = 1.0
    captioned: bool = False

    @property
    def inverting(self) -> dict[str, Any]:
        return {"steps": self.steps, "refine": self.refine, "captioned": self.captioned}

    @property
    def decoding(self) -> dict[str, Any]:
        return {"steps": self.steps, "scale": self.scale, "captioned": self.captioned}


@dataclass(frozen=True)
class Work:
    """A cascade, and the pictures to edit with it.

    Attributes:
        captions: of the desired pictures, one for each; perhaps empty.
        asked: what goes with the captions (`phrases.asked`), in lists of as many entries.
        n: results for each picture.
        size: of a batch.
        pad: whether the cascade sees the whole of a picture, or its centred square.
        progress: as of `in_batches`.
    """

    cascade: Cascade
    canvases: Sequence[Canvas]
    captions: Sequence[str]
    n: int = 1
    seed: int = 0
    size: int = 16
    pad: bool = False
    asked: Batch = field(default_factory=dict)
    progress: Progress | None = None

    def squares(self, *more: int) -> Batch:
        """What the stages see of the pictures (`Canvas.views`); also pictures of `more` sides."""
        sizes = [image_size(link.writes) for link in operations.pictured(self.cascade)]
        sides = {size: (size, size) for size in (*sizes, *more)}
        each = [canvas.views(canvas.square(self.pad), sides) for canvas in self.canvases]
        return {key: torch.cat([views[key] for views in each]) for key in each[0]}

    def embedded(self) -> tuple[FrozenCLIP, Batch]:
        """The cascade's CLIP, and the pictures with their `clip_image`."""
        operations.reading_embeddings(self.cascade)
        clip = clip_of(self.cascade)
        views = self.squares(clip.image_size)
        images = views[operations.KNOWN + image_key(clip.image_size)]
        return clip, {**views, "clip_image": clip.image(images).cpu()}

    def varied(self, eta: float | None = None, way: Way = Way()) -> Float[Tensor, "r f 3 h w"]:
        """Other pictures of the same embedding; with `eta`, from the inverted noise."""
        _, views = self.embedded()
        if eta is None:
            return self.rows(operations.vary, views, captioned=way.captioned)
        views["x_T"] = self.inverted(views, **way.inverting)
        return self.rows(operations.decode, views, eta=eta, **way.decoding)

    def interpolated(
        self, frames: int = 7, slerped: bool = True, way: Way = Way()
    ) -> Float[Tensor, "r f 3 h w"]:
        """Along all pictures, in their order.

        Args:
            frames: of each path.
            slerped: whether their noises are interpolated too, or one noise is kept.

        Raises:
            UserError: fewer than two pictures.
        """
        if len(self.canvases) < 2:
            raise UserError("interpolate needs two pictures or more: --picture FIRST SECOND")
        _, views = self.embedded()
        shares = np.linspace(0, 1, frames).tolist()
        z = views["clip_image"]
        given = {"clip_image": torch.stack([slerp(z[:-1], z[1:], share) for share in shares], 1)}
        if slerped:
            x = self.inverted(views, **way.inverting)
            given["x_T"] = torch.stack([slerp(x[:-1], x[1:], share) for share in shares], 1)
        else:
            base = innermost(self.cascade.painter)
            draw = Draws(self.seed, f"{base.writes}/x_T", range(len(z) - 1))
            x = draw((len(z) - 1, *base.codec.shape({})))
            given["x_T"] = torch.stack([x] * len(shares), 1)
        return self.rows(operations.decode, given, drawn=not slerped, **way.decoding)

    def changed(
        self,
        before: Sequence[str],
        wanted: Sequence[str],
        shares: Sequence[float],
        way: Way = Way(),
    ) -> Float[Tensor, "r f 3 h w"]:
        """The pictures, changed by the difference of two captions for each (unCLIP, section 3.3).

        Args:
            before: of the present pictures; perhaps empty.
            wanted: of the desired ones.
            shares: of the rotation, one for each frame.
        """
        clip, views = self.embedded()
        texts = list(dict.fromkeys([*wanted, *before]))
        z_text = clip.text(texts)["clip_text"].cpu()
        to, of = (z_text[[texts.index(text) for text in some]] for some in (wanted, before))
        z, x = views["clip_image"], self.inverted(views, **way.inverting)
        turned = [text_difference(z, to, of, share) for share in shares]
        given = {"clip_image": torch.stack(turned, 1), "x_T": torch.stack([x] * len(shares), 1)}
        return self.rows(operations.decode, given, **way.decoding)

    def inverted(self, views: Batch, **choices: Any) -> Float[Tensor, "p *d"]:
        """The x_T of the pictures (`inversion.inverted`)."""

        def invert(batch: Batch, report: Any) -> Batch:
            return {"x_T": operations.x_T(self.cascade, batch, report, **choices)}

        given = {**views, **self.asked}
        return in_batches(invert, self.captions, self.size, given, "inverting", self.progress)[
            "x_T"
        ]

    def rows(self, paint: Paint, given: Batch, **choices: Any) -> Float[Tensor, "r f 3 h w"]:
        """What an operation makes of each picture, or each frame [p, f, ...] of a path, `n` times.

        The frames of a path share their noise.

        Args:
            given: keys of a batch; `sample`, if pictures have other numbers than 0, 1, 2...
        """
        z = given.get("clip_image")
        frames = z.shape[1] if z is not None and z.ndim == 3 else 1
        numbers = given.get("sample", torch.arange(len(next(iter(given.values())))))
        numbers = (numbers[:, None] * self.n + torch.arange(self.n)).flatten()
        given = {key: value.repeat_interleave(self.n, 0) for key, value in given.items()}
        if frames > 1:
            given = {key: value.flatten(0, 1) for key, value in given.items()}
        given["sample"] = numbers.repeat_interleave(frames)
        owners = [i // frames // self.n for i in range(len(given["sample"]))]
        given |= {key: [of[i] for i in owners] for key, of in self.asked.items()}
        captions = [self.captions[i] for i in owners]
        last = self.cascade.stages[-1].writes

        def sample(batch: Batch, report: Any) -> Batch:
            return {last: paint(self.cascade, batch, self.seed, report, **choices)[last]}

        made = in_batches(sample, captions, self.size, given, "editing", self.progress)[last]
        return made.unflatten(0, (-1, frames))

    def repainted(self, whole: bool, jumps: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """The canvases with what is unknown painted, `n` of each.

        Args:
            whole: paint canvases of any sides, in windows; otherwise what lies in their squares.
            jumps: times that each step is taken.

        Raises:
            UserError: something unknown lies outside of the square.
        """
        frames, sides = zip(*(self._frame(canvas, whole) for canvas in self.canvases))
        done: dict[int, list] = {}
        for shape in {tuple(one.items()): one for one in sides}.values():
            some = [i for i, one in enumerate(sides) if one == shape]
            each = [self.canvases[i].views(frames[i], shape) for i in some]
            given = {key: torch.cat([views[key] for views in each]) for key in each[0]}
            given["sample"] = torch.tensor(some)
            asked = {key: [of[i] for i in some] for key, of in self.asked.items()}
            part = replace(self, captions=[self.captions[i] for i in some], asked=asked)
            made = part.rows(operations.paint_unknown, given, jumps=jumps).flatten(0, 1)
            for i, pictures in zip(some, made.split(self.n)):
                done[i] = [self.canvases[i].pasted(picture, frames[i]) for picture in pictures]
        return [picture for i in sorted(done) for picture in done[i]]

    def _frame(self, canvas: Canvas, whole: bool) -> tuple[Frame, dict[int, tuple[int, int]]]:
        """What the cascade shows of a canvas, and the sides of its pictures by stage."""
        links = operations.pictured(self.cascade)
        stages = {image_size(link.writes): innermost(link) for link in links}
        divisors = {size: s.net.divisor * s.codec.factor for size, s in stages.items()}
        base = min(divisors)
        frame, sides = canvas.square(self.pad), (base, base)
        if whole:
            multiples = (d // math.gcd(d, size // base) for size, d in divisors.items())
            frame, sides = canvas.whole(base, math.lcm(*multiples))
        if not canvas.within(frame):
            raise UserError("the mask leaves the centred square: add --fit pad")
        return frame, {
            size: (sides[0] * size // base, sides[1] * size // base) for size in divisors
        }


def partly(picture: UInt8[np.ndarray, "h w 3"], unknown: Bool[np.ndarray, "h w"]) -> Canvas:
    """A picture of which a part is to be painted. Raises UserError if that is nothing, or all."""
    if not unknown.any() or unknown.all():
        share = "all" if unknown.any() else "nothing"
        raise UserError(f"{share} would be repainted: mark a part of the picture in white")
    return Canvas(picture, unknown)


def enlarged(picture: UInt8[np.ndarray, "h w 3"], sides: Sequence[int]) -> Canvas:
    """A picture with further pixels on its left, right, top and bottom, to be painted.

    Raises:
        UserError: it would have too many pixels.
    """
    height, width = len(picture) + sum(sides[2:]), picture.shape[1] + sum(sides[:2])
    if height * width > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels: at most {MAX_PIXELS:,} are painted")
    return Canvas.known(picture).enlarged(*sides)


def clip_of(cascade: Cascade) -> FrozenCLIP:
    """The CLIP that the prior's embeddings belong to."""
    for link in cascade.stages:
        for encoder in innermost(link).encoders if link.writes == "clip_image" else ():
            if isinstance(encoder, FrozenCLIP):
                return encoder
    raise UserError("no stage of this cascade names its CLIP: add its prior to cascade.yaml")


def embeddings_of(data: Path) -> Iterator[Float[Tensor, "_ d"]]:
    """The training pictures' embeddings, some at a time."""
    if not (data / EMBEDDINGS).is_dir():
        raise UserError(f"{data} has no embeddings: run `cascade data precompute` first")
    stores = {"clip": Embeddings(data / EMBEDDINGS)}
    shards = Shards(data, Pictures(()), shuffle=False, embeddings=stores)
    for start in range(0, len(shards), 256):
        some = [shards[i] for i in range(start, min(start + 256, len(shards)))]
        yield collate(some)["clip_image"]


def check_context(cascade: Cascade, captions: Sequence[str]) -> None:
    """Raises UserError if a caption is longer than the cascade's encoders read."""
    own = encoders_of(cascade)
    lengths = [one.length for one in own if isinstance(one, (FrozenCLIP, Tokenizer))]
    if lengths and (long := [text for text in captions if exceeds(text, min(lengths))]):
        raise UserError(f"{long[0][:40]!r} is longer than the {min(lengths)} tokens that are read")
