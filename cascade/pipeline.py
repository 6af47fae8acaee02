"""The cascade: a left fold of a batch over its stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from cascade.conditioning import Batch

Progress = Callable[[str, int, int], None]  # (what is written, steps done, steps in all)


@runtime_checkable
class Link(Protocol):
    """What a cascade is made of: it has `reads` and `writes`, and samples the key it writes."""

    def completed(self, batch: Batch) -> Batch: ...

    def sample(self, batch: Batch, seed: int, **choices: Any) -> torch.Tensor: ...


class Around(Link, Protocol):
    """A link that samples another one in its own way."""

    stage: Link

    @property
    def reads(self) -> frozenset[str]:
        return self.stage.reads

    @property
    def writes(self) -> str:
        return self.stage.writes

    def completed(self, batch: Batch) -> Batch:
        return self.stage.completed(batch)


@dataclass(frozen=True)
class BestOf(Around):
    """Samples a stage n times and keeps the result closest to the caption.

    unCLIP (section 2.2) draws two image embeddings and keeps the one with the larger dot product
    with the text embedding.
    """

    stage: Link
    n: int = 2
    by: str = "clip_text"

    def sample(self, batch: Batch, seed: int, progress=None) -> torch.Tensor:
        """The best of `n` samples, for each sample of the batch."""
        drawn = torch.stack(
            [self.stage.sample(batch, seed, str(k), progress) for k in range(self.n)], 1
        )
        target = self.completed(batch)[self.by]
        best = torch.einsum("bnd,bd->bn", drawn, target).argmax(1)
        return drawn[torch.arange(len(drawn)), best]


@dataclass(frozen=True)
class Untold(Around):
    """A stage that is sampled without some of its conditions, to see what they contribute.

    Args:
        without: sources, such as "caption".
    """

    stage: Link
    without: tuple[str, ...]

    def sample(self, batch: Batch, seed: int, purpose: str = "", progress=None) -> torch.Tensor:
        return self.stage.sample(batch, seed, purpose, progress, without=self.without)


@dataclass(frozen=True)
class TextEmbedding(Around):
    """The caption's CLIP embedding in place of a picture's that a prior would draw.

    unCLIP (section 5.1) asks with it what a prior is worth.
    """

    stage: Link
    by: str = "clip_text"

    def sample(self, batch: Batch, seed: int, progress=None) -> torch.Tensor:
        return self.completed(batch)[self.by]


@dataclass(frozen=True)
class Cascade:
    """Stages in order; every key that one reads is given, or written by an earlier one."""

    stages: Sequence[Link]

    def __call__(self, batch: Batch, seed: int, progress: Progress | None = None) -> Batch:
        """The batch with the key that each stage writes.

        A stage whose key is in the batch already is passed over: give `image_16` to start with
        super-resolution, `clip_image` to paint variations.

        Args:
            batch: `caption` and `sample`, of the same length.
            seed: of every draw.
        """
        for stage in self.stages:
            if stage.writes in batch:
                continue
            if missing := stage.reads - batch.keys():
                raise KeyError(f"the stage that writes {stage.writes} lacks {sorted(missing)}")
            report = progress and (lambda i, n, key=stage.writes: progress(key, i, n))
            batch = {**batch, stage.writes: stage.sample(batch, seed, progress=report)}
        return batch
