"""Which stage costs how much: the truth is put in ever later, and the stages behind it paint.

In the first row the whole cascade paints from the captions; each further row is also given what
one more stage should have written, so that the difference from the row above is what this stage
costs, given the true work of those before it. The last row is the truth itself, and so costs add up
to all that the cascade loses. All rows are of the same captions, and the same noise.

Distances are to the pictures that are put in: the truth is at distance 0 from itself, and a row
that is given more of it shares more of the reference's chance. Intervals of costs are of 95 %, by a
jackknife over blocks of captions, which sees that rows share their captions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cascade.conditioning import Batch, enlarge
from cascade.eval.features import CLIPFeatures
from cascade.eval.protocol import (
    JUDGED,
    KINDS,
    HeldOut,
    Metrics,
    Paint,
    compared,
    distance,
    embedded,
    encoded,
    side,
)
from cascade.eval.reader import judge
from cascade.eval.scene_accuracy import rates, tally
from cascade.grids import to_uint8
from cascade.pipeline import Cascade

SMALL = "image_64"  # the least that is judged, shown beside the final size
BLOCKS = 20  # of the jackknife
MEASURES: Mapping[str, str] = {
    "frechet": "Fréchet distance",
    "two": "scenes of two objects",
    "one": "scenes of one object",
    "clip_score": "CLIP score",
}


class Looked(NamedTuple):
    """What pictures of one size are, by caption."""

    features: Float[Tensor, "n d"]
    cosines: Float[Tensor, " n"]  # with their captions
    verdicts: Sequence[Mapping[str, bool]]  # none where the reader does not judge


def attribution(
    cascade: Cascade,
    names: Sequence[str],
    data: HeldOut,
    painted: Batch,
    features: CLIPFeatures,
    paint: Paint,
) -> Metrics:
    """The table, by rows: what is `given`, the measures of each size shown, and what they `cost`.

    `stage` is the one whose work was replaced since the row above, and `cost` how much better this
    row is: Fréchet distance lost, CLIP score and whole scenes right (`one`, `two`) won.

    Args:
        names: of the stages.
        data: true values of all that the stages write.
        painted: what the cascade made of the captions of `data`.
        paint: of one row at a time; of its pictures nothing is kept.
    """
    keys = [stage.writes for stage in cascade.stages]
    shown = [key for key in dict.fromkeys((SMALL, keys[-1])) if key in keys]
    texts = encoded(features.clip.text, data.captions)

    def looked(pictures: Batch, sizes: Sequence[str]) -> dict[str, Looked]:
        return {key: _looked(pictures[key], data, texts, features) for key in sizes}

    truth = looked(data.truth, shown)
    looks, rows = [looked(painted, shown)], [{"given": ["caption"]}]
    for i, name in enumerate(names, start=1):
        given = {key: data.truth[key] for key in keys[:i]}
        if left := [key for key in shown if key not in given]:
            done = paint(cascade, data.captions, given, f"true {keys[i - 1]}")
            looks.append({**truth, **looked(done, left)})
        else:
            looks.append(truth)
        rows.append({"given": ["caption", *given], "stage": name})
    dearest = {}
    for key in shown:
        of_size = [look[key] for look in looks]
        costs, dearest[key] = _costs(of_size, data, features, names)
        for row, look, cost in zip(rows, of_size, [None, *costs]):
            row[key] = _measures(look, truth[key], data)
            if cost is not None:
                row.setdefault("cost", {})[key] = cost
    return {"count": len(data), "sizes": shown, "rows": rows, "dearest": dearest}


def _looked(
    pictures: Float[Tensor, "n 3 h w"],
    data: HeldOut,
    texts: Float[Tensor, "n d"],
    features: CLIPFeatures,
) -> Looked:
    rows = embedded(features, pictures)
    cosines = cosine_similarity(rows, texts)
    scenes = (pictures.shape[-1] in JUDGED and data.scenes) or []
    arrays = to_uint8(pictures[: len(scenes)])
    return Looked(rows, cosines, [judge(*pair) for pair in zip(scenes, arrays, strict=True)])


def _measures(look: Looked, truth: Looked, data: HeldOut) -> Metrics:
    """As `picture_metrics` gives them."""
    out = compared(look.features, truth.features, look.cosines)
    # That interval takes the reference for other pictures'; here it has the same captions.
    out["intervals"].pop("frechet", None)
    for kind in KINDS if look.verdicts else ():
        if rows := data.kind(kind):
            tallies = [tally(data.scenes[i], look.verdicts[i]) for i in rows]
            out[kind] = rates(torch.stack(tallies).sum(0))
    return out


def _costs(
    looks: Sequence[Looked], data: HeldOut, features: CLIPFeatures, names: Sequence[str]
) -> tuple[list[Metrics], Metrics]:
    """What each stage costs, by measure; and which one costs most, where something is surely lost.

    Args:
        looks: of each row; the last is the truth.
    """
    costs: list[Metrics] = [{} for _ in names]
    dearest: Metrics = {}
    for measure, rows in _asked(looks[-1], data, features).items():
        blocks = torch.arange(len(rows)) % BLOCKS
        all_rows = _lost(looks, features, measure, rows)
        left = np.array([_lost(looks, features, measure, rows[blocks != b]) for b in range(BLOCKS)])
        for cost, value, values in zip(costs, all_rows, left.T):
            cost[measure] = {"cost": float(value), "interval": _interval(value, values)}
        first, *others = np.argsort(-all_rows)
        sure = [
            _interval(all_rows[first] - all_rows[i], left[:, first] - left[:, i])[0] > 0
            for i in others
        ]
        if _interval(all_rows.sum(), left.sum(1))[0] > 0:
            most = {"stage": names[first], "cost": float(all_rows[first])}
            dearest[measure] = {**most, "of": float(all_rows.sum()), "sure": all(sure)}
    return costs, dearest


def _asked(look: Looked, data: HeldOut, features: CLIPFeatures) -> dict[str, Int64[Tensor, " r"]]:
    """The measures of which there are enough captions, and these."""
    every = list(range(len(data)))
    rows = {"frechet": every if len(data) >= 4 * features.dim else [], "clip_score": every}
    rows |= {kind: data.kind(kind) if look.verdicts else [] for kind in KINDS}
    return {m: torch.tensor(rows[m]) for m in MEASURES if len(rows[m]) >= 2 * BLOCKS}


def _lost(
    looks: Sequence[Looked], features: CLIPFeatures, measure: str, rows: Int64[Tensor, " r"]
) -> Float[np.ndarray, " stages"]:
    """What is lost by each stage, of some captions: the differences between rows of the table."""
    if measure == "frechet":
        true = looks[-1].features[rows]
        values = [-distance(features, look.features[rows], true, minimum=2) for look in looks]
    elif measure == "clip_score":
        values = [look.cosines[rows].double().mean().item() for look in looks]
    else:
        right = [[look.verdicts[i]["whole"] for i in rows.tolist()] for look in looks]
        values = [sum(part) / len(part) for part in right]
    return np.diff(values)


def _interval(value: float, left: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """A jackknife's: of the value, and of those with a block left out each."""
    b = len(left)
    error = ((b - 1) * left.var()) ** 0.5 * stats.t.ppf(0.975, b - 1)
    return float(value - error), float(value + error)


def sentence(table: Metrics) -> str:
    """Which stage costs most at the final size, by each measure that is surely lost in."""
    size = table["sizes"][-1]
    parts = [
        f"{most['stage']} in {MEASURES[measure]} ({most['cost']:.3g} of {most['of']:.3g}"
        + (")" if most["sure"] else ", not surely more than the next one)")
        for measure, most in table["dearest"][size].items()
    ]
    if not parts:
        return f"At {side(size)} px nothing is surely lost in what was measured."
    return f"At {side(size)} px the stage that costs most is {', '.join(parts)}."


def superresolution(
    cascade: Cascade, data: HeldOut, table: Metrics, features: CLIPFeatures
) -> dict[str, Any] | None:
    """The row of the true smallest picture, beside its bicubic enlargement; None without one."""
    keys = [stage.writes for stage in cascade.stages if stage.writes.startswith("image_")]
    small, large = keys[0], keys[-1]
    if small == large:
        return None
    row = next(row for row in table["rows"] if row["given"][-1] == small)[large]
    out = {"from": small, "to": large, **row}
    if row["frechet"] is not None:
        bicubic = enlarge(data.truth[small], side(large) // side(small)).clamp(-1, 1)
        out["frechet_bicubic"] = distance(features, bicubic, data.truth[large])
        out["frechet_ratio"] = row["frechet"] / out["frechet_bicubic"]
    return out
