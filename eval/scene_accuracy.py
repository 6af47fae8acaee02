"""Scene accuracy: how many pictures show what their captions ask for, judged by the reader.

Only integers are summed, so that N ranks reduce to the very numbers of one rank.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchmetrics import Metric

from cascade.data.captions import Scene
from cascade.eval.reader import judge

MEASURES = ("objects", "binding", "relations", "counts", "whole")


class SceneAccuracy(Metric):
    """Shares of the pictures for which each measure of `eval.reader.judge` is true.

    `relations` is a share of the scenes that ask for a relation, the others of all scenes.
    `compute` gives the shares by name, without those of no scene, and `count`, the pictures judged.
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
            verdict = judge(scene, np.ascontiguousarray(picture))
            for i, measure in enumerate(MEASURES):
                applies = measure != "relations" or scene.relation is not None
                self.asked[i] += applies
                self.right[i] += applies and verdict[measure]

    def compute(self) -> dict[str, float]:
        counts = zip(MEASURES, self.right.tolist(), self.asked.tolist())
        rates = {measure: right / asked for measure, right, asked in counts if asked}
        return {**rates, "count": int(self.asked[-1])}
