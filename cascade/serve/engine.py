"""What is made with loaded models: pictures of captions, and edits.

All of it runs in a worker of the line, and reports every step with the pictures as they are
denoised so far. It samples as `cascade sample` and `cascade edit` do, and gives the same pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from cascade.batch import image_size
from cascade.grids import to_uint8
from cascade.pipeline import Cascade, innermost
from cascade.runs.editing import check_context
from cascade.runs.model import captions_asked, check_asked, paint
from cascade.serve.asked import Painting
from cascade.serve.limits import Limits
from cascade.serve.line import Job
from cascade.serve.store import Store

BATCH = 16  # as of `cascade sample`, so that pictures are the same

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Steps:
    """How far a request is.

    Attributes:
        what: the key or the model that is sampled.
        share: of the whole request, from 0 to 1.
        at, of: the step of this stage, and how many it takes.
        pictures: x0 so far; None: it is no picture.
        first: the number of the first of them.
    """

    what: str
    share: float
    at: int
    of: int
    pictures: Pictures | None = None
    first: int = 0


@dataclass(frozen=True)
class Painted:
    """What was made.

    Attributes:
        asked: what was asked for.
        stages: what each stage wrote, by key, if these are pictures.
        captions: of each picture.
        choices: how each stage was sampled, by stage.
    """

    asked: Painting
    stages: Mapping[str, Pictures]
    captions: Sequence[str]
    choices: Mapping[str, Mapping[str, Any]]

    @property
    def last(self) -> Pictures:
        return list(self.stages.values())[-1]


class Engine:
    """One device with its loaded models."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.store = Store(limits.memory)

    def paint(self, asked: Painting, job: Job, within: tuple[float, float] = (0.0, 1.0)) -> Painted:
        """Paint captions.

        Args:
            within: the shares of the request at which this begins and ends.

        Raises:
            UserError: what is asked for is not possible, or exceeds the limits.
            Cancelled: as of `Job.report`.
        """
        texts = [*asked.captions, *([asked.negative] if asked.negative else [])]
        self.limits.check_captions(texts)
        self.limits.check_count(len(asked.captions) * asked.n)
        given = captions_asked(asked.captions, asked.negative or None)
        cascade, choices = self.store.loaded(asked.place, asked.sets)
        self.check_steps(cascade)
        check_context(cascade, texts)
        check_asked(cascade, given)
        given = {key: [one for one in of for _ in range(asked.n)] for key, of in given.items()}
        progress = Progress(cascade, len(given["caption"]), job, within)
        done = paint(cascade, given["caption"], asked.seed, BATCH, given, progress=progress)
        stages = {key: to_uint8(value) for key, value in done.items() if image_size(key)}
        return Painted(asked, stages, given["caption"], choices)

    def compare(self, asked: Sequence[Painting], job: Job) -> list[Painted]:
        """Paint the same with several models, one after another."""
        count = len(asked)
        return [self.paint(one, job, (i / count, (i + 1) / count)) for i, one in enumerate(asked)]

    def check_steps(self, cascade: Cascade) -> None:
        """Raise UserError if a stage takes more steps than are allowed."""
        for link in cascade.stages:
            sampler = innermost(link).sampler
            if steps := getattr(sampler, "steps", None):
                self.limits.check_steps(steps, link.writes)


class Progress:
    """Tells a job the steps of a cascade: a `pipeline.Progress`."""

    def __init__(
        self, cascade: Cascade, count: int, job: Job, within: tuple[float, float] = (0.0, 1.0)
    ):
        self.keys = [link.writes for link in cascade.stages]
        self.batches, self.batch = -(-count // BATCH), 0
        self.job, self.within, self.share, self.stage = job, within, 0.0, 0

    def __call__(self, key: str, i: int, n: int, value: Callable[[], torch.Tensor]) -> None:
        stage = self.keys.index(key)
        if stage < self.stage:
            self.batch += 1
        self.stage = stage
        of = (self.batch + (stage + i / n) / len(self.keys)) / self.batches
        self.share = max(self.share, min(1.0, of))
        pictures = to_uint8(value()) if image_size(key) else None
        low, high = self.within
        share = low + (high - low) * self.share
        self.job.report(Steps(key, share, i, n, pictures, self.batch * BATCH))
