"""Class labels: a caption that is the number of a class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.encoders.identity import Former, OfCaptions
from cascade.errors import UserError


class Labels(OfCaptions):
    """Writes `label` [b]: the class that a caption names by its number, from 0.

    Args:
        classes: how many there are (ImageNet: 1000).
    """

    writes = frozenset({"label"})
    name, hash, sizes = "class numbers", "", {}
    former = Former("")

    def __init__(self, classes: int):
        self.classes = classes

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The labels. Raises UserError if a caption is no class's number."""
        for caption in captions:
            if not (caption.strip().isdecimal() and int(caption) < self.classes):
                raise UserError(
                    f"caption {caption[:40]!r} is no class: give a number from 0 to "
                    f"{self.classes - 1}"
                )
        return {"label": torch.tensor([int(caption) for caption in captions]).to(self.device)}
