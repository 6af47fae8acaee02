"""How a cascade is measured: the held-out samples, and the measures of its pictures.

Every number covers all captions, with one picture each and no selection. Distances are computed in
the feature space of a judging CLIP that neither conditions the cascade nor reranks its samples.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cascade.batch import Batch, image_size
from cascade.data.scenes.generate import Scene
from cascade.eval.metrics.distances import frechet_rows
from cascade.eval.metrics.features import CLIPFeatures, Features
from cascade.eval.metrics.interval import of_share
from cascade.eval.metrics.measures import EVALUATION, Sample, measures
from cascade.eval.metrics.statistics import Moments, Origin
from cascade.eval.scenes.recognizer import judge
from cascade.grids import to_uint8
from cascade.pipeline import Cascade

Metrics = dict[str, Any]
JUDGED = (64, 256, 1024)  # sides in pixels at which scenes are recognized
KINDS = ("one", "two")  # of captions: how many objects they name
# Of captions in many wordings: whether training captions use all of their words and forms.
PHRASINGS = ("known phrasing", "held-out phrasing")
CRITERIA = ("objects", "binding", "relations", "counts", "whole")  # of `recognizer.judge`
DRAWS = 100  # bootstrap resamples
# (cascade, captions, given keys, title of the progress bar) -> all keys that the cascade writes.
Paint = Callable[[Cascade, Sequence[str], Batch, str], Batch]


class Looked(NamedTuple):
    """What is measured of pictures of one size, by caption; the pictures themselves can go."""

    rows: Float[Tensor, "n d"]  # features
    cosines: Float[Tensor, " n"]  # with the captions
    verdicts: Sequence[Mapping[str, bool]]  # of the recognizer; empty at sizes it does not judge

    def where(self, rows: Sequence[int]) -> "Looked":
        """What is measured of some captions."""
        chosen = list(rows)
        verdicts = [self.verdicts[i] for i in chosen] if self.verdicts else ()
        return Looked(self.rows[chosen], self.cosines[chosen], verdicts)


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples: captions, true values by batch key, and scenes if there are any.

    Attributes:
        shown: the concept and the style of each picture, if all samples name them.
    """

    captions: list[str]
    truth: Batch
    scenes: list[Scene] | None = None
    shown: list[tuple[str, str]] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, rows: Sequence[int], keys: Collection[str] | None = None) -> "HeldOut":
        """Some rows, with the true values of some keys (None: of all); tensors are copied."""
        rows, keys = list(rows), self.truth.keys() if keys is None else keys
        return HeldOut(
            [self.captions[i] for i in rows],
            {key: value[rows] for key, value in self.truth.items() if key in keys},
            self.scenes and [self.scenes[i] for i in rows],
            self.shown and [self.shown[i] for i in rows],
        )

    def first(self, count: int) -> "HeldOut":
        """The first rows; tensors are views."""
        return HeldOut(
            self.captions[:count],
            {key: value[:count] for key, value in self.truth.items()},
            self.scenes and self.scenes[:count],
            self.shown and self.shown[:count],
        )

    def kind(self, kind: str) -> list[int]:
        """The rows whose captions are of a kind (see `KINDS` and `PHRASINGS`)."""
        return [i for i, scene in enumerate(self.scenes or []) if kind in _kinds(scene)]


def _kinds(scene: Scene) -> set[str]:
    return {scene.kind, *([PHRASINGS[bool(scene.wording.novel)]] if scene.wording else [])}


@torch.no_grad()
def embedded(features: Features, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """The features of pictures in [-1, 1], 64 pictures at a time, on the CPU."""
    return torch.cat([features(part).cpu() for part in pictures.split(64)])


def distance(
    features: Features, generated: Tensor, real: Tensor, minimum: int | None = None
) -> float | None:
    """`frechet_rows` of pictures [n, 3, h, w], or of rows of features [n, d]."""
    pair = [embedded(features, x) if x.ndim == 4 else x for x in (generated, real)]
    return frechet_rows(*pair, minimum)


def encoded(
    encode: Callable[[Sequence[str]], Mapping[str, Tensor]], captions: Sequence[str]
) -> Float[Tensor, "n d"]:
    """The text embeddings (`clip_text`) of captions, 64 captions at a time, on the CPU."""
    parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
    return torch.cat([encode(part)["clip_text"].float().cpu() for part in parts])


def looking(data: HeldOut, features: CLIPFeatures) -> Callable[[Batch], dict[str, Looked]]:
    """A function that looks at pictures of the captions of `data`, by `image_{size}`."""
    texts = encoded(features.clip.text, data.captions)

    def look(pictures: Batch) -> dict[str, Looked]:
        found = {}
        for key in sorted(filter(image_size, pictures), key=image_size):
            rows = embedded(features, pictures[key])
            cosines = cosine_similarity(rows, texts)
            found[key] = Looked(rows, cosines, verdicts(pictures[key], data))
        return found

    return look


def picture_metrics(
    looks: Mapping[str, Looked],
    data: HeldOut,
    real: Mapping[str, Float[Tensor, "m d"]],
    features: CLIPFeatures,
) -> Metrics:
    """The measures of each size of generated pictures, and scene accuracy by kind of caption.

    Args:
        looks: by `image_{size}`, of the captions of `data`. The CLIP score is of pictures of at
            least 64 px.
        real: features of the reference, by the same keys.
    """
    out: Metrics = {}
    for key, look in looks.items():
        cosines = look.cosines if image_size(key) in JUDGED else None
        out[key] = measured(sample_of(features, look.rows, real[key], cosines))
        out[key] |= by_kind(look.verdicts, data)
    return out


def verdicts(pictures: Float[Tensor, "n 3 h w"], data: HeldOut) -> list[dict[str, bool]]:
    """The recognizer's, by caption; none without scenes, and at sizes that it does not judge."""
    scenes = (pictures.shape[-1] in JUDGED and data.scenes) or []
    some = pictures[: len(scenes)].split(64)  # bytes of all at once need copies of all
    shown = (picture for part in some for picture in to_uint8(part))
    return [judge(*pair) for pair in zip(scenes, shown, strict=True)]


def by_kind(found: Sequence[Mapping[str, bool]], data: HeldOut) -> Metrics:
    """The rates of right pictures by kind of caption, from the verdicts that were `found`."""
    kinds = {kind: data.kind(kind) for kind in (*KINDS, *PHRASINGS) if found}
    return {
        kind: rates(torch.stack([tally(data.scenes[i], found[i]) for i in rows]))
        for kind, rows in kinds.items()
        if rows
    }


def tally(scene: Scene, verdict: Mapping[str, bool]) -> Int64[Tensor, "2 m"]:
    """By criterion, whether a picture meets it (row 0) and whether its scene asks for it (row 1).

    Only scenes of two objects ask for a relation; all scenes ask for the other criteria.
    """
    asked = [criterion != "relations" or scene.relation is not None for criterion in CRITERIA]
    right = [a and verdict[criterion] for a, criterion in zip(asked, CRITERIA)]
    return torch.tensor([right, asked], dtype=torch.int64)


def rates(tallies: Int64[Tensor, "n 2 m"]) -> dict[str, Any]:
    """The share of right pictures by criterion, without criteria that no scene asks for.

    `intervals` holds their 95 % intervals (Wilson's), `count` the number of pictures.
    """
    counts = tallies.sum(0)
    shares = {
        c: (right / asked, asked) for c, right, asked in zip(CRITERIA, *counts.tolist()) if asked
    }
    return {
        **{criterion: share for criterion, (share, _) in shares.items()},
        "intervals": {criterion: of_share(*of) for criterion, of in shares.items()},
        "count": int(counts[1, -1]),
    }


def sample_of(
    features: Features,
    rows: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    cosines: Float[Tensor, " n"] | None,
    **more: Any,
) -> Sample:
    """What the measures of pictures are computed from, with the moments of `real` as reference."""
    x = real.double()
    cov = x.T.cov(correction=min(1, len(x) - 1))
    reference = Moments(x.mean(0), cov, len(x), Origin())
    fields = {"draws": DRAWS, **more}
    return Sample(
        space=features, rows=rows, real=real, reference=reference, cosines=cosines, **fields
    )


def measured(of: Sample) -> Metrics:
    """`count`, the value of each measure (None: too few pictures), and 95 % `intervals`."""
    out: Metrics = {"count": len(of.rows)}
    for measure in measures(EVALUATION, of):
        out[measure.key] = measure.compute(of)
        intervals = out.setdefault("intervals", {})
        if out[measure.key] is not None and (ends := measure.interval(of)):
            intervals[measure.key] = ends
    return out


def against(targets: Mapping[str, Any], metrics: Metrics) -> list[Metrics]:
    """Each target with the measured value, and whether it is reached."""
    rows = []
    for path, target in targets.items():
        value: Any = metrics
        for part in path.split("."):
            value = value[part]
        least, most = target.get("at_least"), target.get("at_most")
        reached = value is not None and (value >= least if most is None else value <= most)
        asked = f"at least {least}" if most is None else f"at most {most}"
        row = {"what": target["what"], "asked": asked, "measured": value, "reached": reached}
        rows.append({"path": path, **row})
    return rows


def rate(metrics: Metrics | None, name: str) -> str | None:
    """A rate with its interval; None if it was not measured."""
    if not metrics or name not in metrics:
        return None
    return within(metrics[name], metrics["intervals"][name])


def within(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:.3g} ({low:.3g} to {high:.3g})"
