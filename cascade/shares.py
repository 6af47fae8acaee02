"""Tensors that are divided among ranks (FSDP2's DTensors): to whole ones, and back.

Whole tensors are laid out as on one device, weights of convolutions channels-last, and shares in
rows: a fused optimizer pairs numbers by their place in memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def whole(tree: Any) -> Any:
    """The tree with whole tensors, in memory of the CPU, for shares: on rank 0; None on others.

    All ranks must ask together. Without shares it is the tree itself, on every rank.
    """

    def gathered(share: DTensor) -> Tensor | None:
        full = share.full_tensor()
        if dist.get_rank() > 0:
            return None
        layout = torch.channels_last if full.ndim == 4 else torch.contiguous_format
        return full.cpu().contiguous(memory_format=layout)

    return tree_map_only(DTensor, gathered, tree)


def placed(full: Tensor, like: Tensor) -> Tensor:
    """The tensor on the device of `like`; where that is a share, this rank's share of the tensor.

    Every rank has the whole tensor.
    """
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    full = full.contiguous()
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
