"""Pictures painted from captions of a concept in a style, against the true picture of both.

The JSON of the samples names what a picture shows, its `concept`, and how, its `style`. A judging
CLIP that took no part retrieves the true picture of the asked concept and style among those of
other concepts in the style, and among those of the concept in other styles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cascade.data.tars.splits import TRAIN
from cascade.errors import UserError
from cascade.eval.cascades.protocol import Metrics
from cascade.eval.cascades.styles import Gallery, Styled
from cascade.eval.metrics.features import Features
from cascade.eval.metrics.interval import of_share
from cascade.eval.pictures.extraction import features_of_split

# What training has shown of an asked concept and style.
KINDS = ("trained", "held-out pair", "held-out concept")


@dataclass(frozen=True)
class Concepts:
    """True pictures of concepts in styles: those of training, then those of a split.

    Attributes:
        trained: how many are of training.
    """

    gallery: Gallery
    trained: int

    def measured(self, rows: Float[Tensor, "n d"], asked: Sequence[tuple[str, str]]) -> Metrics:
        """What a judge sees in pictures that were painted from captions.

        `retrieval`, `style` and `both` are as in `Gallery.judged`, `among_styles` is the retrieval
        of the true picture among those of its concept. `kinds` has all of these apart by what
        training has shown, `truth` the rate of `style` of the true pictures, and `nearest` how the
        nearest training picture relates to what was asked.

        Args:
            rows: features of the pictures, of unit norm.
            asked: the concept and the style that the caption of each asked for.
        """
        own = [self._own[pair] for pair in asked]
        found = self._rates(rows, own)
        kinds = [self._kind(*pair) for pair in asked]
        found["kinds"] = {
            kind: self._rates(rows[places], [own[i] for i in places])
            for kind in KINDS
            if (places := [i for i, of in enumerate(kinds) if of == kind])
        }
        true = self.gallery.in_style(self.gallery.rows[own], own).float().mean().item()
        found["truth"] = {"style": true, "intervals": {"style": of_share(true, len(own))}}
        return {**found, "nearest": self._nearest(rows, asked, own), "styles": len(self._styles)}

    def _rates(self, rows: Float[Tensor, "n d"], own: Sequence[int]) -> Metrics:
        found = self.gallery.judged(rows, own)
        right, several = self.among_styles(rows, own)
        if count := int(several.sum()):
            rate = right[several].float().mean().item()
            found["among_styles"] = rate
            found["intervals"]["among_styles"] = of_share(rate, count)
        return found

    def among_styles(
        self, rows: Float[Tensor, "n d"], own: Sequence[int]
    ) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Whether each row is nearer to its true picture than to all others of its concept.

        The second tensor tells which concepts are shown in another style at all. A tie is wrong.
        """
        labels, right, several = self.gallery.labels, [], []
        for row, j in zip(rows, own, strict=True):
            shown = self._shown[labels[j].concept]
            rivals = [i for i in shown if labels[i].style != labels[j].style]
            cosines = self.gallery.rows[[j, *rivals]] @ row
            right.append(bool((cosines[0] > cosines[1:]).all()))
            several.append(bool(rivals))
        return torch.tensor(right), torch.tensor(several)

    def _nearest(
        self, rows: Float[Tensor, "n d"], asked: Sequence[tuple[str, str]], own: Sequence[int]
    ) -> Metrics:
        """The mean cosine to the nearest training picture, and what that shows.

        `true_cosine` is that of the true pictures, where training has not shown them.
        """
        known = self.gallery.rows[: self.trained]
        best = (rows @ known.T).max(1)
        near = [self.gallery.labels[i][:2] for i in best.indices.tolist()]
        found: Metrics = {"cosine": best.values.mean().item(), "intervals": {}}
        if held_out := [j for j in own if j >= self.trained]:
            true = (self.gallery.rows[held_out] @ known.T).amax(1)
            found["true_cosine"] = true.mean().item()
        for i, name in enumerate(("concept", "style")):
            same = [a[i] == b[i] for a, b in zip(near, asked, strict=True)]
            found[name] = sum(same) / len(same)
            found["intervals"][name] = of_share(found[name], len(same))
        return found

    def _kind(self, concept: str, style: str) -> str:
        shown = [i for i in self._shown[concept] if i < self.trained]
        if not shown:
            return "held-out concept"
        styles = {self.gallery.labels[i].style for i in shown}
        return "trained" if style in styles else "held-out pair"

    @cached_property
    def _shown(self) -> dict[str, list[int]]:
        """The numbers of the pictures of each concept."""
        found: dict[str, list[int]] = {}
        for i, label in enumerate(self.gallery.labels):
            found.setdefault(label.concept, []).append(i)
        return found

    @cached_property
    def _own(self) -> dict[tuple[str, ...], int]:
        """The number of the first picture of the split, or else of training, of each label."""
        labels = [label[:2] for label in self.gallery.labels]
        order = [*range(self.trained, len(labels)), *range(self.trained)]
        return {labels[i]: i for i in reversed(order)}

    @cached_property
    def _styles(self) -> set[str]:
        return {label.style for label in self.gallery.labels}


def concepts_of(
    data: Path, split: str, features: Features, side: int, seed: int
) -> Concepts | None:
    """The true pictures of a split, and of training.

    Returns:
        None: not all samples name a concept and a style, or there is one style or concept alone.
    """
    parts = [Styled(data, TRAIN), Styled(data, split)]
    try:
        labels = [label for part in parts for label in part.labels]
    except UserError:  # the measure does not apply
        return None
    if min(len({label[i] for label in labels}) for i in (0, 1)) < 2:
        return None
    rows = [features_of_split(data, part.split, side, features) for part in parts]
    return Concepts(Gallery(labels, torch.cat(rows), seed), len(rows[0]))
