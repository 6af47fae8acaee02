"""Random draws that depend on (seed, purpose, sample number) alone.

Batch size, rank and resumption therefore change nothing of a sample: neither its crop in training
nor its noise in sampling. The streams are PCG64, seeded through NumPy's `SeedSequence`.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, purpose: str, sample: int) -> np.random.Generator:
    """The random stream of one sample for one purpose ("crop", "noise", ...)."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), sample])


class Draws:
    """Standard normal draws for a batch, from one stream per sample: a `Noise`.

    `Draws(seed, purpose, samples)((b, ...))` returns float32 of that shape. Row i comes from the
    stream of `samples[i]`, which advances, so that successive calls differ.
    """

    def __init__(
        self,
        seed: int,
        purpose: str,
        samples: Sequence[int] | Tensor,
        device: torch.device | str = "cpu",
    ):
        numbers = samples.tolist() if isinstance(samples, Tensor) else samples
        self._streams = [generator(seed, purpose, int(n)) for n in numbers]
        self._device = device

    def __call__(self, shape: tuple[int, ...]) -> Float[Tensor, "b *d"]:
        if shape[0] != len(self._streams):
            raise ValueError(f"{len(self._streams)} samples, but a draw of shape {tuple(shape)}")
        out = np.empty(shape, dtype=np.float32)
        for row, stream in zip(out.reshape(shape[0], -1), self._streams):
            stream.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(out).to(self._device)
