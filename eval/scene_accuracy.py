"""Scene accuracy: how many pictures show what their captions ask for, judged by the reader.

Only integers are summed, so that N ranks reduce to the very numbers of one rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchmetrics import Metric

from cascade.data.captions import Scene
from cascade.eval.interval import of_share
from cascade.eval.reader import judge

MEASURES = ("objects", "binding", "relations", "counts", "whole")


def tally(scene: Scene, verdict: Mapping[str, bool]) -> Int64[Tensor, "2 m"]:
    """By measure, whether it is right in a picture, and whether it is asked for."""
    asked = [measure != "relations" or scene.relation is not None for measure in MEASURES]
    right = [a and verdict[measure] for a, measure in zip(asked, MEASURES)]
    return torch.tensor([right, asked], dtype=torch.int64)


def rates(counts: Int64[Tensor, "2 m"]) -> dict[str, Any]:
    """Of a sum of tallies: shares by measure, without those that nothing asked for.

    Beside them `intervals`, of 95 %, and `count`, the pictures judged.
    """
    shares = {
        m: (right / asked, asked) for m, right, asked in zip(MEASURES, *counts.tolist()) if asked
    }
    return {
        **{measure: share for measure, (share, _) in shares.items()},
        "intervals": {measure: of_share(*of) for measure, of in shares.items()},
        "count": int(counts[1, -1]),
    }


class SceneAccuracy(Metric):
    """Shares of the pictures for which each measure of `eval.reader.judge` is true.

    `relations` is a share of the scenes that ask for a relation, the others of all scenes.
    `compute` gives `rates`.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ("right", "asked"):
            zeros = torch.zeros(len(MEASURES), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(
        self,
        pictures: UInt8[Tensor, "b 3 h w"] | Sequence[UInt8[np.ndarray, "h w 3"]],
        scenes: Sequence[Scene],
    ) -> None:
        """Judges pictures of 64 px or more; ValueError if they are not as many as the scenes."""
        if isinstance(pictures, Tensor):
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
        for picture, scene in zip(pictures, scenes, strict=True):
            right, asked = tally(scene, judge(scene, np.ascontiguousarray(picture)))
            self.right += right.to(self.right)
            self.asked += asked.to(self.asked)

    def compute(self) -> dict[str, Any]:
        return rates(torch.stack([self.right, self.asked]))
