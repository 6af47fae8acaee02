"""How well ControlNets steer a cascade on scenes: the condition of what was painted, and the asked.

Each held-out scene is painted twice with its caption and the same noise, with the condition of the
true picture and without. Edges are compared by F1 within `REACH` pixels, segmentation and depth by
the mean intersection over union of the shapes that the recognizer finds.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from scipy import ndimage
from torch.nn import functional as F

from cascade.batch import Batch, hint_key
from cascade.data.conditions import OfPicture, OfScene, labels
from cascade.data.transforms import Condition, scaled, shrink
from cascade.errors import UserError
from cascade.eval.cascades.protocol import HeldOut, Metrics, Paint, against, verdicts
from cascade.eval.metrics.interval import of_mean, of_share
from cascade.eval.scenes.recognizer import recognize
from cascade.grids import to_uint8
from cascade.pipeline import Cascade

REACH = 2.0  # pixels between edges that count as the same
LOSS = 0.03  # of scene accuracy, at most
SHOWN = 6  # pictures of a row of the report
Picture = UInt8[np.ndarray, "s s 3"]


def check(
    cascade: Cascade, data: HeldOut, conditions: Mapping[str, Condition]
) -> dict[str, OfPicture | OfScene]:
    """The conditions that can be measured. UserError if there are none, or their scenes lack."""
    measured = {n: c for n, c in conditions.items() if isinstance(c, OfPicture | OfScene)}
    if not measured:
        raise UserError("--control: no stage reads a condition that can be measured; leave it out")
    if not data.scenes:
        raise UserError("--control is measured on scenes, of which the data has none; leave it out")
    side = data.truth[cascade.stages[-1].writes].shape[-1]
    for name, condition in measured.items():
        if side < max(64, condition.size) or side % condition.size:
            raise UserError(
                f"--control: {name} has {condition.size} px, the pictures {side} px: measure with "
                f"a super-resolution stage that paints {max(64, condition.size)} px"
            )
    return measured


def measure_control(
    cascade: Cascade,
    conditions: Mapping[str, Condition],
    data: HeldOut,
    paint: Paint,
    count: int,
) -> tuple[Metrics, Batch]:
    """The measures by condition, and pictures of the report.

    Args:
        conditions: that the stages read, by name.
        data: held-out scenes, of which the first `count` are painted.
    """
    some, last = data.first(count), cascade.stages[-1].writes
    found = check(cascade, some, conditions)
    plain = paint(cascade, some.captions, {}, "uncontrolled")[last]
    out: Metrics = {"count": len(some), "uncontrolled": {"accuracy": _accuracy(plain, some)}}
    shown: Batch = {"caption": some.captions[:SHOWN] * (1 + 2 * len(found)), last: [plain[:SHOWN]]}
    for name, condition in found.items():
        true = _seen(some.truth[last], condition.size)
        if isinstance(condition, OfPicture):
            asked = [condition(one) for one in true]
        else:
            asked = [condition.by(scene, condition.size) for scene in some.scenes]
        pictures = torch.stack([scaled(one) for one in asked])
        given = {hint_key(name, condition.size): pictures}
        made = paint(cascade, some.captions, given, name)[last]
        score = _edges if isinstance(condition, OfPicture) else _shapes
        row = {
            key: torch.tensor(
                [
                    score(condition, *one)
                    for one in zip(asked, some.scenes, _seen(painted, condition.size))
                ]
            )
            for key, painted in (("asked", made), ("uncontrolled", plain))
        }
        out[name] = {
            "measure": "F1" if score is _edges else "mean IoU",
            **{key: scores.mean().item() for key, scores in row.items()},
            "intervals": {key: of_mean(scores) for key, scores in row.items()},
            "accuracy": _accuracy(made, some),
        }
        out[name]["loss"] = out["uncontrolled"]["accuracy"]["rate"] - out[name]["accuracy"]["rate"]
        large = F.interpolate(pictures[:SHOWN], made.shape[-2:])
        shown[last] += [large, made[:SHOWN]]
    shown[last] = torch.cat(shown[last])
    targets: dict[str, Any] = {}
    for name in found:
        what = f"{name}: {out[name]['measure']} of what was painted"
        targets[f"{name}.asked"] = {"what": what, "at_least": 0.8}
        targets[f"{name}.uncontrolled"] = {"what": f"{what} without it", "at_most": 0.4}
        targets[f"{name}.loss"] = {"what": f"{name}: scene accuracy lost", "at_most": LOSS}
    return {**out, "targets": against(targets, out)}, shown


def f1(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"], reach: float) -> float:
    """The harmonic mean of the shares of each that lie within `reach` pixels of the other."""
    if not (one.any() and other.any()):
        return float(one.any() == other.any())
    near = [ndimage.distance_transform_edt(~mask) <= reach for mask in (one, other)]
    shares = near[0][other].mean(), near[1][one].mean()
    return float(2 * shares[0] * shares[1] / max(sum(shares), 1e-12))


def mean_iou(one: Int64[np.ndarray, "h w"], other: Int64[np.ndarray, "h w"]) -> float:
    """Intersection over union, averaged over the classes that occur in either."""
    classes = np.union1d(one, other)
    pairs = [(one == k, other == k) for k in classes]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def _edges(condition: Any, asked: Picture, scene: Any, painted: Picture) -> float:
    return f1(*(one[..., 0] > 127 for one in (asked, condition(painted))), REACH)


def _shapes(condition: Any, asked: Picture, scene: Any, painted: Picture) -> float:
    found = recognize(painted).objects
    return mean_iou(*(labels(tuple(some), condition.size) for some in (scene.objects, found)))


def _seen(pictures: torch.Tensor, size: int) -> UInt8[np.ndarray, "n s s 3"]:
    return to_uint8(pictures if pictures.shape[-1] == size else shrink(pictures, size))


def _accuracy(pictures: torch.Tensor, data: HeldOut) -> Metrics:
    right = [verdict["whole"] for verdict in verdicts(pictures, data)]
    share = sum(right) / len(right)
    return {"rate": share, "interval": of_share(share, len(right))}
