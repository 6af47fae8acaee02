"""Attribution: how much each stage of a cascade costs.

In the first row of the table the whole cascade generates from the captions. In each further row one
more stage is given its true output, so that the difference to the row above is the cost of that
stage, given the true output of the stages before it. In the last row everything is true, so the
costs add up to the total loss of the cascade. All rows share the captions and the noise.

Distances are to the same true pictures that are given: the truth is at distance 0 from itself, and
a row with more true outputs shares more of the reference's sampling error. Intervals of costs are
95 % jackknife intervals over blocks of captions, which accounts for the captions that rows share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor

from cascade.batch import image_size
from cascade.conditioning import enlarge
from cascade.eval.cascades import protocol
from cascade.eval.cascades.protocol import KINDS, HeldOut, Looked, Metrics, Paint
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.metrics.measures import ATTRIBUTION, Measure, Sample, measures
from cascade.pipeline import Cascade

SMALL = "image_64"  # the smallest judged size, shown next to the final one
BLOCKS = 20  # of the jackknife


def attribution(
    cascade: Cascade,
    names: Sequence[str],
    data: HeldOut,
    begun: Mapping[str, Looked],
    truth: Mapping[str, Looked],
    features: CLIPFeatures,
    paint: Paint,
) -> Metrics:
    """The table: for each row the keys that were `given`, and the measures and costs by size.

    `stage` is the stage whose output was replaced by the truth since the row above, and `cost` by
    how much each measure improved.

    Args:
        names: of the stages.
        data: true values of all keys that the stages write but the last.
        begun: what the cascade painted of the captions of `data`.
        truth: the true pictures.
        paint: called for one row at a time, whose pictures are dropped once measured.
    """
    keys = [stage.writes for stage in cascade.stages]
    shown = [key for key in dict.fromkeys((SMALL, keys[-1])) if key in keys]
    look = protocol.looking(data, features)
    truth = {key: truth[key] for key in shown}
    looks, rows = [{key: begun[key] for key in shown}], [{"given": ["caption"]}]
    for i, name in enumerate(names, start=1):
        if left := [key for key in shown if key not in keys[:i]]:
            given = {key: data.truth[key] for key in keys[:i]}
            done = paint(cascade, data.captions, given, f"true {keys[i - 1]}")
            looks.append({**truth, **look({key: done[key] for key in left})})
        else:
            looks.append(truth)
        rows.append({"given": ["caption", *keys[:i]], "stage": name})
    dearest = {}
    for key in shown:
        of_size = [seen[key] for seen in looks]
        samples = [_sample(look, truth[key], features) for look in of_size]
        costs, dearest[key] = _costs(samples, data, names)
        for row, seen, of, cost in zip(rows, of_size, samples, [None, *costs]):
            row[key] = protocol.measured(of) | protocol.by_kind(seen.verdicts, data)
            if cost is not None:
                row.setdefault("cost", {})[key] = cost
    return {"count": len(data), "sizes": shown, "rows": rows, "dearest": dearest}


def _sample(look: Looked, truth: Looked, features: CLIPFeatures) -> Sample:
    right = torch.tensor([verdict["whole"] for verdict in look.verdicts]) if look.verdicts else None
    # No bootstrap: its interval assumes a reference of other pictures than those of the captions.
    return protocol.sample_of(features, look.rows, truth.rows, look.cosines, right=right, draws=0)


def _costs(
    samples: Sequence[Sample], data: HeldOut, names: Sequence[str]
) -> tuple[list[Metrics], Metrics]:
    """The costs of each stage by measure; and the stage with the largest cost, by each measure in
    which the cascade loses significantly.

    Args:
        samples: of each row; the last is the truth.
    """
    costs: list[Metrics] = [{} for _ in names]
    dearest: Metrics = {}
    for measure, rows in _enough(samples[-1], data).items():
        blocks = torch.arange(len(rows)) % BLOCKS
        all_rows = _lost(samples, measure, rows)
        left = np.array([_lost(samples, measure, rows[blocks != b]) for b in range(BLOCKS)])
        for cost, value, values in zip(costs, all_rows, left.T):
            cost[measure.key] = {"cost": float(value), "interval": _interval(value, values)}
        first, *others = np.argsort(-all_rows)
        sure = [
            _interval(all_rows[first] - all_rows[i], left[:, first] - left[:, i])[0] > 0
            for i in others
        ]
        if _interval(all_rows.sum(), left.sum(1))[0] > 0:
            most = {"stage": names[first], "cost": float(all_rows[first])}
            dearest[measure.key] = {**most, "of": float(all_rows.sum()), "sure": all(sure)}
    return costs, dearest


def _enough(truth: Sample, data: HeldOut) -> dict[Measure, Int64[Tensor, " r"]]:
    """The measures with enough captions for a jackknife, and the rows of these captions."""
    found = {}
    for measure in measures(ATTRIBUTION, truth):
        rows = data.kind(measure.key) if measure.key in KINDS else range(len(data))
        rows = torch.tensor(list(rows), dtype=torch.int64)
        if len(rows) >= 2 * BLOCKS and measure.compute(_some(truth, rows)) is not None:
            found[measure] = rows
    return found


def _some(of: Sample, rows: Int64[Tensor, " r"], **more: Any) -> Sample:
    """A sample of some captions, whose true pictures are the reference."""
    parts = {name: getattr(of, name) for name in ("rows", "real", "cosines", "right")}
    return replace(of, **{k: x if x is None else x[rows] for k, x in parts.items()}, **more)


def _lost(
    samples: Sequence[Sample], measure: Measure, rows: Int64[Tensor, " r"]
) -> Float[np.ndarray, " stages"]:
    """The loss by stage, over some captions: the differences between rows of the table."""
    values = [measure.compute(_some(of, rows, minimum=2)) for of in samples]
    return np.diff([-v if measure.less else v for v in values])


def _interval(value: float, left: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """The jackknife interval of a value, from its values with one block left out each."""
    b = len(left)
    error = ((b - 1) * left.var()) ** 0.5 * stats.t.ppf(0.975, b - 1)
    return float(value - error), float(value + error)


def sentence(table: Metrics) -> str:
    """Which stage costs most at the final size, by each measure with a significant loss."""
    size = table["sizes"][-1]
    names = {measure.key: measure.name for measure in measures(ATTRIBUTION)}
    parts = [
        f"{most['stage']} in {names[key]} ({most['cost']:.3g} of {most['of']:.3g}"
        + (")" if most["sure"] else ", not significantly more than the next one)")
        for key, most in table["dearest"][size].items()
    ]
    if not parts:
        return f"At {image_size(size)} px no measure shows a significant loss."
    return f"At {image_size(size)} px the stage that costs most is {', '.join(parts)}."


def superresolution(
    cascade: Cascade,
    data: HeldOut,
    truth: Mapping[str, Looked],
    table: Metrics,
    features: CLIPFeatures,
) -> dict[str, Any] | None:
    """The table's row for the true smallest picture, with the distance of bicubic enlargement.

    None for a cascade that generates one size. `truth` is what was looked at in the true pictures.
    """
    keys = [stage.writes for stage in cascade.stages if image_size(stage.writes)]
    small, large = keys[0], keys[-1]
    if small == large:
        return None
    row = next(row for row in table["rows"] if row["given"][-1] == small)[large]
    out = {"from": small, "to": large, **row}
    if row["frechet"] is not None:
        factor = image_size(large) // image_size(small)
        parts = (enlarge(x, factor).clamp(-1, 1) for x in data.truth[small].split(64))
        bicubic = torch.cat([protocol.embedded(features, part) for part in parts])
        out["frechet_bicubic"] = protocol.distance(features, bicubic, truth[large].rows)
        out["frechet_ratio"] = row["frechet"] / out["frechet_bicubic"]
    return out
