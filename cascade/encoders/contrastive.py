"""CLIP's contrastive loss over the samples of all ranks."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def contrastive(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "n d"],
    own: Int64[Tensor, " m"],
    captions: Int64[Tensor, " n"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, " m"]:
    """-log softmax_j(scale a_i . b_j) at j = own_i (CLIP, figure 3), one direction.

    Other samples with the same caption are not negatives: they are left out of the sum.

    Args:
        own: for each row of a, the row of b that it belongs to.
        captions: a number for each row of b, equal for equal captions.
    """
    rivals = captions[own][:, None] == captions
    rivals = rivals.scatter(1, own[:, None], False)
    logits = (scale * a @ b.T).masked_fill(rivals, -math.inf)
    return F.cross_entropy(logits, own, reduction="none")


def gathered(x: Float[Tensor, "b *d"] | Int64[Tensor, "b *d"]) -> Tensor:
    """Gathers the rows of all ranks, in the order of ranks, with gradients."""
    return torch.cat(all_gather(x)) if dist.is_initialized() else x
