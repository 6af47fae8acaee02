"""How well a cascade changes the style of pictures, against the true pictures of the asked style.

The JSON of the samples names what a picture shows, its `concept`, and how, its `style`. A judging
CLIP retrieves the true picture of a concept in a style among pictures of that style: by the picture
that is edited, and by the edited one.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cascade.batch import Batch, image_key, image_size
from cascade.data.shards import Shards
from cascade.data.tars.splits import ALL
from cascade.data.transforms import Pictures
from cascade.draws import generator
from cascade.edit import operations
from cascade.edit.canvas import Canvas
from cascade.errors import UserError
from cascade.eval.cascades.protocol import Metrics, against, embedded
from cascade.eval.metrics.features import Features
from cascade.eval.metrics.interval import of_share
from cascade.grids import to_uint8
from cascade.pipeline import Cascade
from cascade.runs.editing import Way, Work, clip_of

GALLERY = 64  # true pictures of a style, among which one is to be retrieved
SHARES = (0.2, 0.3, 0.4, 0.5)  # of the rotation to a text difference
STEPS = 25  # of DDIM
SHOWN = 12
TARGETS = {
    "style.over_chance": {
        "what": "text difference of the style: retrieval, over chance",
        "at_least": 5,
    },
    "style.over_none": {
        "what": "text difference of the style: retrieval, over that without an edit",
        "at_least": 2,
    },
}


class Label(NamedTuple):
    """What a sample shows, and how."""

    concept: str
    style: str
    caption: str


@dataclass(frozen=True)
class Styled:
    """The samples of a split, by number."""

    data: Path
    split: str

    @cached_property
    def labels(self) -> list[Label]:
        """Raises UserError if a sample names no concept or no style."""
        fields = ("concept", "style")
        bare = Shards(self.data, Pictures(()), self.split, shuffle=False, json_fields=fields)
        items = [bare[i] for i in range(len(bare))]
        for item in items:
            if not all(isinstance(item[key], str) for key in fields):
                raise UserError(
                    f"{self.data}: the JSON of {item['key']} has neither a `scene`, nor a "
                    "`concept` and a `style`: leave --edits out"
                )
        return [Label(item["concept"], item["style"], item["caption"]) for item in items]

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return [self.labels[i].caption for i in numbers]

    def pictures(self, numbers: Sequence[int], side: int) -> Float[Tensor, "n 3 side side"]:
        """Pictures in [-1, 1]."""
        shards = Shards(self.data, Pictures((side,)), self.split, shuffle=False)
        return torch.stack([shards[i][image_key(side)] for i in numbers])

    def features(self, features: Features, side: int) -> Float[Tensor, "m d"]:
        """A judge's features of all pictures, some at a time: a split need not fit in memory."""
        n = len(self.labels)
        parts = (range(i, min(i + 256, n)) for i in range(0, n, 256))
        return torch.cat([embedded(features, self.pictures(part, side)) for part in parts])


def pairs_of(
    data: Path, split: str, count: int, seed: int
) -> tuple[Styled, Styled, list[tuple[int, int]]]:
    """Pictures to edit, true pictures, and at most `count` pairs of their numbers.

    Each of the first true pictures of the split is paired with one of its concept in another style,
    at random: of the split or, if the split shows each concept once, of all splits.

    Raises:
        UserError: the samples name no concepts and styles; no concept is shown in two styles, one
            of which has `GALLERY` pictures.
    """
    truths = Styled(data, split)
    once = len({label.concept for label in truths.labels}) == len(truths.labels)
    sources = Styled(data, ALL) if once else truths
    shown: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(sources.labels):
        shown[label.concept].append(i)
    sizes = Counter(label.style for label in truths.labels)
    pairs = []
    for j, label in enumerate(truths.labels):
        others = [i for i in shown[label.concept] if sources.labels[i].style != label.style]
        if others and sizes[label.style] >= GALLERY and len(pairs) < count:
            pairs.append((others[generator(seed, "styles", j).integers(len(others))], j))
    if not pairs:
        raise UserError(
            f"{data}: {split} shows no concept in two styles, one of at least {GALLERY} pictures: "
            "leave --edits out"
        )
    return sources, truths, pairs


@dataclass(frozen=True)
class Gallery:
    """True pictures of concepts in styles, as a judge sees them.

    Attributes:
        rows: features of unit norm.
    """

    labels: Sequence[Label]
    rows: Float[Tensor, "m d"]
    seed: int

    def judged(self, rows: Float[Tensor, "n d"], own: Sequence[int]) -> Metrics:
        """The rates of `retrieved`, of `in_style` and of both, with 95 % intervals (Wilson's).

        Args:
            rows: features of pictures, of unit norm.
            own: the numbers of the true pictures of their concepts and styles.
        """
        right = {"retrieval": self.retrieved(rows, own), "style": self.in_style(rows, own)}
        right["both"] = right["retrieval"] & right["style"]
        rates = {name: of.float().mean().item() for name, of in right.items()}
        intervals = {name: of_share(rate, len(rows)) for name, rate in rates.items()}
        return {**rates, "intervals": intervals, "count": len(rows)}

    def retrieved(self, rows: Float[Tensor, "n d"], own: Sequence[int]) -> Bool[Tensor, " n"]:
        """Whether each row's own true picture is the nearest among `GALLERY` of that style.

        The others show other concepts (all there are, if they are fewer), and depend on the true
        picture alone. A tie is wrong.
        """
        drawn = [self._drawn(j) for j in own]
        cosines = torch.stack([self.rows[of] @ row for of, row in zip(drawn, rows, strict=True)])
        return cosines[:, 0] > cosines[:, 1:].amax(1)

    def _drawn(self, j: int) -> list[int]:
        """The number of a true picture, then those of its rivals."""
        concepts, styles = self._codes
        rivals = ((styles == styles[j]) & (concepts != concepts[j])).nonzero()[:, 0].numpy()
        count = min(GALLERY - 1, len(rivals))
        chosen = generator(self.seed, "gallery", j).choice(rivals, count, replace=False)
        return [j, *chosen.tolist()]

    def in_style(self, rows: Float[Tensor, "n d"], own: Sequence[int]) -> Bool[Tensor, " n"]:
        """Whether the nearest of the styles' means to each row is that of its true picture.

        Means are over pictures of other concepts.
        """
        concepts, styles = self._codes
        right = []
        for row, j in zip(rows, own, strict=True):
            others = [(styles == k) & (concepts != concepts[j]) for k in range(styles.max() + 1)]
            means = torch.stack([self.rows[some].mean(0) for some in others])
            right.append((means - row).norm(dim=1).argmin() == styles[j])
        return torch.stack(right)

    @cached_property
    def _codes(self) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
        """Numbers for the concepts and the styles of the labels."""
        columns = zip(*((label.concept, label.style) for label in self.labels))
        one, other = (np.unique(names, return_inverse=True)[1] for names in columns)
        return torch.from_numpy(one), torch.from_numpy(other)


def measure_styles(
    cascade: Cascade, data: Path, split: str, features: Features, seed: int, count: int
) -> tuple[Metrics, Batch]:
    """Text differences of the style by their share of the rotation, and some pictures to show.

    The rates are those of the best share, `none` has those of the pictures that are edited, and
    `truth` those of the true pictures.

    Raises:
        UserError: as `pairs_of`; no stage reads embeddings of a CLIP.
    """
    sources, truths, pairs = pairs_of(data, split, count, seed)
    side = image_size(cascade.stages[-1].writes)
    before, own = (list(numbers) for numbers in zip(*pairs))
    seen = sources.pictures(before, max(side, clip_of(cascade).image_size))
    canvases = [Canvas.known(picture) for picture in to_uint8(seen)]
    work = Work(cascade, canvases, [""] * len(pairs), seed=seed, size=64)
    captions = sources.captions(before), truths.captions(own)
    made = work.changed(*captions, SHARES, Way(steps=STEPS))
    given = work.squares()[operations.KNOWN + image_key(side)]
    gallery = Gallery(truths.labels, truths.features(features, side), seed)
    rows = [embedded(features, made[:, i]) for i in range(len(SHARES))]
    by_share = [{"share": s, **gallery.judged(of, own)} for s, of in zip(SHARES, rows)]
    best = max(by_share, key=lambda row: row["both"])
    none = gallery.judged(embedded(features, given), own)
    out = {
        "style": {
            **best,
            "over_chance": best["retrieval"] * GALLERY,
            "over_none": best["retrieval"] / max(none["retrieval"], 1 / GALLERY),
            "side": side,
            "gallery": GALLERY,
            "none": none,
            "truth": gallery.judged(gallery.rows[own], own),
            "by_share": by_share,
        }
    }
    edited = made[:SHOWN, SHARES.index(best["share"])]
    true = truths.pictures(own[:SHOWN], side)
    sheet = _sheet([given[:SHOWN], edited, true], captions)
    return {**out, "targets": against(TARGETS, out)}, sheet


def _sheet(rows: Sequence[Float[Tensor, "n 3 h w"]], captions: Sequence[Sequence[str]]) -> Batch:
    """Rows of six: the pictures that are edited, and below them the edited and the true ones."""
    before, asked = captions
    titles = [before, [f"edited: {text}" for text in asked], [f"true: {text}" for text in asked]]
    pictures, words = [], []
    for start in range(0, len(rows[0]), 6):
        for row, title in zip(rows, titles, strict=True):
            pictures.append(row[start : start + 6])
            words += title[start : start + len(pictures[-1])]
    return {image_key(rows[0].shape[-1]): torch.cat(pictures), "caption": words}
