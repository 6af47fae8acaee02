"""The cascade: a left fold of a batch over its stages.

The classes around a stage (`BestOf`, `Without`, `TextEmbedding`) sample it in another way and take
its place in the fold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from cascade.batch import Batch, image_size
from cascade.diffusion.sampling import Watch

# Called in each step, with the key being sampled, the steps done, the steps in total, and a
# function that gives the key's value as it is denoised so far.
Progress = Callable[[str, int, int, Callable[[], torch.Tensor]], None]


@runtime_checkable
class Link(Protocol):
    """One step of a cascade: it samples the batch key `writes`, given the keys `reads`."""

    def encoded(self, batch: Batch) -> Batch: ...

    def sample(self, batch: Batch, seed: int, **choices: Any) -> torch.Tensor: ...


@runtime_checkable
class Around(Link, Protocol):
    """A link that samples the one inside it in its own way."""

    stage: Link

    @property
    def reads(self) -> frozenset[str]:
        return self.stage.reads

    @property
    def writes(self) -> str:
        return self.stage.writes

    @property
    def leads_away(self) -> bool:
        return self.stage.leads_away

    @property
    def unit(self) -> bool:
        return getattr(self.stage, "unit", True)

    def encoded(self, batch: Batch) -> Batch:
        return self.stage.encoded(batch)


def innermost(link: Link) -> Any:
    """The stage inside links that sample it in their own way."""
    while isinstance(link, Around):
        link = link.stage
    return link


def altered(link: Link, change: Callable[[Any], Link]) -> Link:
    """The same link around a changed stage."""
    if isinstance(link, Around):
        return replace(link, stage=altered(link.stage, change))
    return change(link)


def watching(link: Link, progress: Progress) -> Watch:
    """What reports the steps of a link's sampler, whose x0 its stage decodes."""
    stage = innermost(link)
    return lambda i, n, x0: progress(stage.writes, i, n, lambda: stage.codec.decode(x0))


@dataclass(frozen=True)
class BestOf(Around):
    """Samples a stage n times and keeps the result closest to the caption.

    unCLIP (section 2.2) draws two image embeddings and keeps the one that has the larger dot
    product with the text embedding.

    Args:
        by: batch key of the embedding to compare with.
    """

    stage: Link
    n: int = 2
    by: str = "clip_text"

    def sample(self, batch: Batch, seed: int, progress=None) -> torch.Tensor:
        """For each row of the batch, the best of `n` draws."""
        drawn = torch.stack(
            [self.stage.sample(batch, seed, str(k), progress) for k in range(self.n)], 1
        )
        target = self.encoded(batch)[self.by]
        # The length of a raw embedding is not a merit.
        compared = drawn if self.unit else F.normalize(drawn, dim=2)
        best = torch.einsum("bnd,bd->bn", compared, target).argmax(1)
        return drawn[torch.arange(len(drawn)), best]


@dataclass(frozen=True)
class Without(Around):
    """Samples a stage without some of its conditions, to measure what they contribute.

    Args:
        without: the sources to drop: "caption", "clip_image".
    """

    stage: Link
    without: tuple[str, ...]

    @property
    def leads_away(self) -> bool:
        return self.stage.leads_away and "caption" not in self.without

    def sample(self, batch: Batch, seed: int, purpose: str = "", progress=None) -> torch.Tensor:
        return self.stage.sample(batch, seed, purpose, progress, without=self.without)


@dataclass(frozen=True)
class TextEmbedding(Around):
    """Replaces a prior by the caption's CLIP text embedding: nothing is sampled.

    unCLIP (section 5.1) measures the benefit of a prior this way.
    """

    stage: Link
    by: str = "clip_text"

    @property
    def leads_away(self) -> bool:
        return False

    def sample(self, batch: Batch, seed: int, progress=None) -> torch.Tensor:
        return self.encoded(batch)[self.by]


@dataclass(frozen=True)
class Cascade:
    """Stages in the order of sampling. A stage reads keys of the batch and of earlier stages."""

    stages: Sequence[Link]

    def __call__(self, batch: Batch, seed: int, progress: Progress | None = None) -> Batch:
        """Sample every stage in turn; returns the batch with the keys they write.

        Stages whose key the batch already holds are skipped: pass `image_16` to start with
        super-resolution, `clip_image` to sample variations.

        Args:
            batch: at least `caption` and `sample`, of the same length.
            seed: of all draws; row i also depends on its number `sample[i]`, and on no other row.
            progress: what it raises ends the sampling.

        Raises:
            KeyError: a stage reads a key that is neither given nor written.
        """
        for stage in self.stages:
            if stage.writes in batch:
                continue
            if missing := stage.reads - batch.keys():
                raise KeyError(f"the stage that writes {stage.writes} lacks {sorted(missing)}")
            report = progress and watching(stage, progress)
            batch = {**batch, stage.writes: stage.sample(batch, seed, progress=report)}
        return batch

    def upto(self, key: str) -> "Cascade":
        """The stages up to the one that writes `key`; all of them if none does."""
        keys = [stage.writes for stage in self.stages]
        return Cascade(self.stages[: keys.index(key) + 1] if key in keys else self.stages)

    def replace(self, stage: Link) -> "Cascade":
        """The same cascade with `stage` in place of the one that writes the same key."""
        return Cascade([stage if one.writes == stage.writes else one for one in self.stages])

    @property
    def painter(self) -> Link:
        """The first stage that samples pictures."""
        return next(stage for stage in self.stages if image_size(stage.writes))
