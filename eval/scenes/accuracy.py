"""Scene accuracy: the share of pictures that show what their captions ask for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cascade.data.scenes.captions import Scene
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.recognizer import judge

CRITERIA = ("objects", "binding", "relations", "counts", "whole")  # of `recognizer.judge`


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


def accuracy(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """The `rates` of pictures of at least 64 px, each judged by the scene of its caption."""
    verdicts = [judge(*pair) for pair in zip(scenes, pictures, strict=True)]
    return rates(torch.stack([tally(*pair) for pair in zip(scenes, verdicts)]))
