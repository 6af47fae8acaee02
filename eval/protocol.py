"""How a cascade is measured: what is painted, and what is computed from it.

Every number is of all captions asked for, one picture each, none chosen. Distances are in the named
feature space of a judge that neither conditions nor reranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cascade.conditioning import Batch
from cascade.data.scenes import Scene
from cascade.eval.features import CLIPFeatures, Features
from cascade.eval.interval import of_frechet, of_mean
from cascade.eval.metrics import FrechetDistance
from cascade.eval.scene_accuracy import SceneAccuracy
from cascade.grids import to_uint8
from cascade.pipeline import Cascade, Untold

Metrics = dict[str, Any]
JUDGED = (64, 256, 1024)  # sides at which the scene reader judges
KINDS = ("one", "two")  # of captions: how many objects they ask for
DRAWS = 100  # of the bootstrap of a distance
# Called with a cascade, captions, given keys and a title; gives what the cascade wrote.
Paint = Callable[[Cascade, Sequence[str], Batch, str], Batch]


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples: captions, their scenes if they have any, and the true pictures by key."""

    captions: list[str]
    truth: Batch
    scenes: list[Scene] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, rows: Sequence[int]) -> "HeldOut":
        rows = list(rows)
        return HeldOut(
            [self.captions[i] for i in rows],
            {key: value[rows] for key, value in self.truth.items()},
            self.scenes and [self.scenes[i] for i in rows],
        )

    def first(self, count: int) -> "HeldOut":
        """The first rows, whose pictures are not copied."""
        return HeldOut(
            self.captions[:count],
            {key: value[:count] for key, value in self.truth.items()},
            self.scenes and self.scenes[:count],
        )

    def kind(self, kind: str) -> list[int]:
        """The rows whose caption asks for so many objects."""
        return [i for i, scene in enumerate(self.scenes or []) if scene.kind == kind]


@torch.no_grad()
def embedded(features: Features, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    return torch.cat([features(part).cpu() for part in pictures.split(64)])


def distance(
    features: Features, generated: Tensor, real: Tensor, minimum: int | None = None
) -> float:
    """Fréchet distance between pictures, or between rows of features."""
    pair = [embedded(features, x) if x.ndim == 4 else x for x in (generated, real)]
    metric = FrechetDistance(pair[0].shape[1], minimum=minimum)
    metric.update(pair[0], real=False)
    metric.update(pair[1], real=True)
    return metric.compute().item()


def accuracy(pictures: Float[Tensor, "n 3 h w"], scenes: Sequence[Scene]) -> Metrics:
    """The five rates of `SceneAccuracy`, their intervals, and the number of pictures."""
    metric = SceneAccuracy()
    metric.update(list(to_uint8(pictures)), list(scenes))
    return metric.compute()


def encoded(
    read: Callable[[Sequence[str]], Mapping[str, Tensor]], captions: Sequence[str]
) -> Float[Tensor, "n d"]:
    """The text embeddings that `read` makes of captions, 64 at a time."""
    parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
    return torch.cat([read(part)["clip_text"].float().cpu() for part in parts])


def frechet_rows(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float | None:
    """Fréchet distance of two sets of rows; None where they are too few for it."""
    metric = FrechetDistance(a.shape[1])
    if min(len(a), len(b)) < metric.minimum:
        return None
    metric.update(a, real=False)
    metric.update(b, real=True)
    return metric.compute().item()


def picture_metrics(
    painted: Batch, data: HeldOut, real: Batch, features: Features, clip
) -> Metrics:
    """Of each size that was painted: `compared`, and accuracy by kind of caption.

    Args:
        painted: holds `image_{size}` for the captions of `data`.
        real: holds the pictures that the distance is measured to, or their features, by the same
            keys.
        clip: the judge, for the CLIP score of pictures of at least 64 px.
    """
    out: Metrics = {}
    texts, looks = encoded(clip.text, data.captions), CLIPFeatures(clip)
    for key in sorted((k for k in painted if k.startswith("image_")), key=side):
        rows, cosines, judged = embedded(features, painted[key]), None, side(key) in JUDGED
        if judged:
            seen = rows if features.hash == looks.hash else embedded(looks, painted[key])
            cosines = cosine_similarity(seen, texts)
        to = real[key] if real[key].ndim == 2 else embedded(features, real[key])
        out[key] = compared(rows, to, cosines)
        for kind in KINDS if judged else ():
            if asked := data.kind(kind):
                out[key][kind] = accuracy(painted[key][asked], [data.scenes[i] for i in asked])
    return out


def compared(
    rows: Float[Tensor, "n d"], real: Float[Tensor, "m d"], cosines: Float[Tensor, " n"] | None
) -> Metrics:
    """Of pictures' features: how many, their distance, and their mean cosine with captions.

    Beside them `intervals` of 95 %. The distance is None where pictures are too few for it, and the
    score is left out without cosines.
    """
    out: Metrics = {"count": len(rows), "frechet": frechet_rows(rows, real), "intervals": {}}
    if out["frechet"] is not None:
        real = real.double()
        low, high = of_frechet(rows, real.mean(0), real.T.cov(), DRAWS)
        out["intervals"]["frechet"] = max(low, 0.0), high
    if cosines is not None:
        out["clip_score"] = cosines.double().mean().item()
        if len(cosines) > 1:
            out["intervals"]["clip_score"] = of_mean(cosines)
    return out


def without_text(cascade: Cascade) -> Cascade:
    """The same cascade, whose first painting stage is not told the caption."""
    stages = list(cascade.stages)
    i = next(i for i, stage in enumerate(stages) if stage.writes.startswith("image_"))
    stages[i] = Untold(stages[i], ("caption",))
    return replace(cascade, stages=stages)


def side(key: str) -> int:
    """Of the pictures of a batch key, in pixels."""
    return int(key.removeprefix("image_"))
