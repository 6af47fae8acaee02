"""From a batch to the condition that a network reads, through four ports.

The ports are `vector`, `tokens` with their `mask`, and `image` (see `Cond`); what else a condition
holds describes their parts. A `Conditioner` has one embedder for each batch key that conditions its
stage. Captions and CLIP embeddings are dropped at random (classifier-free guidance). A drop is
drawn once per source, so that all keys computed from the caption are dropped together, and mixed in
by `torch.where`, so that every parameter gets a gradient on every rank. The low-resolution picture
is never dropped.
"""

from cascade.conditioning.captions import Sequence, last, mean, weighed, with_empty
from cascade.conditioning.cond import Cond, Mask, log_weights
from cascade.conditioning.conditioner import Conditioner
from cascade.conditioning.pictures import (
    LowRes,
    enlarge,
    enlarge_aligned,
    enlarge_antialiased,
    enlarge_linear,
)
from cascade.conditioning.vectors import Extent, Fourier, Label, Vector

__all__ = [
    "Cond",
    "Conditioner",
    "Extent",
    "Fourier",
    "Label",
    "LowRes",
    "Mask",
    "Sequence",
    "Vector",
    "enlarge",
    "enlarge_aligned",
    "enlarge_antialiased",
    "enlarge_linear",
    "last",
    "log_weights",
    "mean",
    "weighed",
    "with_empty",
]
