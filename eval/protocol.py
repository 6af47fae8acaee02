"""How a cascade is measured: what is painted, and what is computed from it.

Every number is of all captions asked for, one picture each, none chosen. Distances are in the named
feature space of a judge that neither conditions nor reranks. Each stage is also measured alone, fed
with the truth, so that a loss of quality can be laid at its door.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cascade.conditioning import Batch, enlarge
from cascade.data.scenes import Scene
from cascade.eval.features import Features
from cascade.eval.metrics import CLIPScore, FrechetDistance, retrieval_at_1
from cascade.eval.scene_accuracy import SceneAccuracy
from cascade.grids import to_uint8
from cascade.pipeline import Cascade

Metrics = dict[str, Any]
JUDGED = (64, 256, 1024)  # sides at which the scene reader judges
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

    def kind(self, kind: str) -> list[int]:
        """The rows whose caption asks for so many objects."""
        return [i for i, scene in enumerate(self.scenes or []) if scene.kind == kind]


@torch.no_grad()
def embedded(features: Features, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    return torch.cat([features(part) for part in pictures.split(64)])


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
    """The five rates of `SceneAccuracy`, and the number of pictures."""
    metric = SceneAccuracy()
    metric.update(list(to_uint8(pictures)), list(scenes))
    return metric.compute()


def picture_metrics(
    painted: Batch, data: HeldOut, real: Batch, features: Features, clip
) -> Metrics:
    """Of each size that was painted: distance, CLIP score, and accuracy by kind of caption.

    Args:
        painted: holds `image_{size}` for the captions of `data`.
        real: holds the pictures that the distance is measured to, by the same keys.
        clip: the judge, for the CLIP score of pictures of at least 64 px.
    """
    out: Metrics = {}
    texts = torch.cat(
        [clip.text(data.captions[i : i + 64])["clip_text"] for i in range(0, len(data), 64)]
    )
    for key in sorted((k for k in painted if k.startswith("image_")), key=_side):
        enough = len(painted[key]) >= 4 * features.dim
        row: Metrics = {"frechet": distance(features, painted[key], real[key]) if enough else None}
        if _side(key) in JUDGED:
            score = CLIPScore()
            score.update(embedded(clip.image, painted[key]), texts)
            row["clip_score"] = score.compute().item()
            for kind in ("one", "two"):
                if rows := data.kind(kind):
                    row[kind] = accuracy(painted[key][rows], [data.scenes[i] for i in rows])
        out[key] = row
    return out


def without_text(cascade: Cascade) -> Cascade:
    """The same cascade, whose first painting stage is not told the caption."""
    stages = list(cascade.stages)
    i = next(i for i, stage in enumerate(stages) if stage.writes.startswith("image_"))
    stages[i] = Untold(stages[i], ("caption",))
    return replace(cascade, stages=stages)


@dataclass(frozen=True)
class Untold:
    """A stage that is sampled without some of its conditions."""

    stage: Any
    without: tuple[str, ...]

    @property
    def reads(self) -> frozenset[str]:
        return self.stage.reads

    @property
    def writes(self) -> str:
        return self.stage.writes

    def sample(self, batch: Batch, seed: int, progress=None) -> Tensor:
        return self.stage.sample(batch, seed, progress=progress, without=self.without)


def prior_metrics(drawn: Tensor, text: Tensor, true: Tensor) -> Metrics:
    """The prior's embeddings against the true ones, beside the text embeddings in their place.

    unCLIP, section 5.1: what is a prior worth? All rows [n, d] are of unit norm.
    """
    d = true.shape[1]
    size = min(256, len(true))
    out = {
        "cosine": F.cosine_similarity(drawn, true).mean().item(),
        "cosine_text": F.cosine_similarity(text, true).mean().item(),
        "cosine_unrelated": F.cosine_similarity(drawn, true.roll(1, 0)).mean().item(),
        "frechet": frechet_rows(drawn, true, d),
        "frechet_text": frechet_rows(text, true, d),
        "retrieval": retrieval_at_1(drawn[:size], true[:size]),
        "retrieval_text": retrieval_at_1(text[:size], true[:size]),
    }
    out["frechet_ratio"] = out["frechet"] / out["frechet_text"]
    out["retrieval_ratio"] = out["retrieval"] / max(out["retrieval_text"], 1 / size)
    return out


def frechet_rows(a: Tensor, b: Tensor, d: int) -> float:
    metric = FrechetDistance(d)
    metric.update(a, real=False)
    metric.update(b, real=True)
    return metric.compute().item()


def superresolution_metrics(
    cascade: Cascade, data: HeldOut, features: Features, paint: Paint
) -> Metrics:
    """Super-resolution from true small pictures, beside bicubic enlargement."""
    keys = [stage.writes for stage in cascade.stages if stage.writes.startswith("image_")]
    small, large = keys[0], keys[-1]
    done = paint(
        cascade, data.captions, {small: data.truth[small], **_embedding(data)}, "true input"
    )
    bicubic = enlarge(data.truth[small], _side(large) // _side(small)).clamp(-1, 1)
    out: Metrics = {"count": len(data), "from": small, "to": large}
    for name, pictures in (("frechet", done[large]), ("frechet_bicubic", bicubic)):
        out[name] = distance(features, pictures, data.truth[large])
    out["frechet_ratio"] = out["frechet"] / out["frechet_bicubic"]
    if data.scenes:
        for kind in ("one", "two"):
            rows = data.kind(kind)
            scenes = [data.scenes[i] for i in rows]
            out[kind] = accuracy(done[large][rows], scenes)
    return out


def _embedding(data: HeldOut) -> Batch:
    return {"clip_image": data.truth["clip_image"]} if "clip_image" in data.truth else {}


def _side(key: str) -> int:
    return int(key.removeprefix("image_"))
