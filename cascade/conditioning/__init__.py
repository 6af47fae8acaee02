"""From a batch to the condition that a network reads, through four ports.

The ports are `vector`, `tokens` with their `mask`, and `image` (see `Cond`); what else a condition
holds describes their parts. A `Conditioner` has one embedder for each batch key that conditions its
stage. Configurations name all of them here.
"""

from cascade.conditioning.cond import Cond, Mask, log_weights
from cascade.conditioning.conditioner import Conditioner
from cascade.conditioning.embedders import (
    Fourier,
    LowRes,
    Sequence,
    Vector,
    enlarge,
    last,
    mean,
    weighed,
)

__all__ = [
    "Cond",
    "Conditioner",
    "Fourier",
    "LowRes",
    "Mask",
    "Sequence",
    "Vector",
    "enlarge",
    "last",
    "log_weights",
    "mean",
    "weighed",
]
