"""What x is: how a stage's target is read from a batch and written back into one.

A codec names the key that its stage writes, encodes that key to x0 (about unit variance), decodes
x0 to the key, and gives the shape to sample. `fit` sees training batches before the first step.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Batch


class Pixels(nn.Module):
    """Pictures in [-1, 1], as they are.

    Args:
        size: side in pixels; written as `image_{size}`.
        low: side of the low-resolution picture of a super-resolution stage; the sampled shape
            follows from that of `image_{low}`, which may be larger than in training.
    """

    def __init__(self, size: int, low: int | None = None):
        super().__init__()
        self.size, self.low = size, low
        self.writes = f"image_{size}"

    def fit(self, batches: Iterable[Batch]) -> None:
        """Pixels need no statistics."""

    def encode(self, batch: Batch) -> Float[Tensor, "b 3 h w"]:
        return batch[self.writes]

    def decode(self, x0: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return x0.clamp(-1, 1)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        if self.low is None:
            return 3, self.size, self.size
        sides = batch[f"image_{self.low}"].shape[2:]
        return 3, *(side * self.size // self.low for side in sides)


class Embedding(nn.Module):
    """CLIP embeddings of unit norm, scaled to zero mean and unit variance in each dimension.

    The mean and deviation are those of the training embeddings (Karlo does the same; unCLIP
    multiplies by 17.2 instead, appendix C) and belong to the checkpoint. Decoding normalises.

    Args:
        size: d, the size of the embedding.
        key: the batch key that is read in training and written in sampling.
    """

    def __init__(self, size: int, key: str = "clip_image"):
        super().__init__()
        self.size, self.writes = size, key
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.full((size,), size**-0.5))

    def fit(self, batches: Iterable[Batch]) -> None:
        z = torch.cat([batch[self.writes] for batch in batches]).double()
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0).clamp(min=1e-4))

    def encode(self, batch: Batch) -> Float[Tensor, "b d"]:
        return (batch[self.writes] - self.mean) / self.std

    def decode(self, x0: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return F.normalize(x0 * self.std + self.mean, dim=1)

    def shape(self, batch: Batch) -> tuple[int, ...]:
        return (self.size,)
