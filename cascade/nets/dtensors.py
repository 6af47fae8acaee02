"""Gathers sharded tensors (FSDP2's DTensors) to full ones, and shards full ones again.

Full tensors have the memory layout of a single device, with convolution weights channels-last;
shards are contiguous, because a fused optimizer pairs numbers by their place in memory. A single
process has no DTensors, and does not import them, which takes a second.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only


def whole(tree: Any) -> Any:
    """Replaces the shards in a tree by full tensors on the CPU of rank 0, and by None elsewhere.

    All ranks must call it. A tree without shards is returned unchanged, on every rank.
    """
    if not dist.is_initialized():
        return tree
    from torch.distributed.tensor import DTensor

    def gathered(share: DTensor) -> Tensor | None:
        full = share.full_tensor()
        if dist.get_rank() > 0:
            return None
        layout = torch.channels_last if full.ndim == 4 else torch.contiguous_format
        return full.cpu().contiguous(memory_format=layout)

    return tree_map_only(DTensor, gathered, tree)


def placed(full: Tensor, like: Tensor) -> Tensor:
    """Moves a full tensor to the device of `like`, and shards it if `like` is a shard.

    Every rank passes the same full tensor.
    """
    full = full.to(like.device)
    if not dist.is_initialized():
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return full
    full = full.contiguous()
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
