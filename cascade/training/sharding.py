"""How a training is divided among several devices: DDP by default, or FSDP2.

With DDP every rank holds everything, and gradients are averaged. With FSDP2 a rank holds its share
of each parameter, gradient, moment and average (DTensors), and whole parameters are put together a
block at a time. What leaves a training (checkpoints, weights) are whole, plain tensors in the order
of one device, so that any number of ranks, with either, goes on from it.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from cascade.errors import UserError
from cascade.shares import placed, whole
from cascade.training.cost import blocks

# What a stage computes with whole parameters in; each rank enters them together.
ENTRANCES = ("training_step", "measure", "sample")


def replicated(
    devices: int | str | Sequence[int], num_nodes: int, seconds: float = 1800.0
) -> Strategy | str:
    """DDP on several devices, nothing on one.

    Args:
        devices, num_nodes: as Lightning's Trainer takes them.
        seconds: after which a rank gives up to wait for the others.
    """
    if not _several(devices, num_nodes):
        return "auto"
    # Every parameter gets a gradient on every rank: none is looked for that did not. Gradients
    # live in the buckets that are reduced, rather than twice.
    return DDPStrategy(timeout=timedelta(seconds=seconds), gradient_as_bucket_view=True)


def sharded(
    devices: int | str | Sequence[int], num_nodes: int, seconds: float = 1800.0
) -> Strategy | str:
    """FSDP2 on several devices, nothing on one; arguments as for `replicated`."""
    if not _several(devices, num_nodes):
        return "auto"
    return Sharded(timeout=timedelta(seconds=seconds))


def _several(devices: int | str | Sequence[int], num_nodes: int) -> bool:
    kind = CUDAAccelerator if torch.cuda.is_available() else CPUAccelerator
    if devices == "auto":
        devices = kind.auto_device_count()
    return num_nodes * len(kind.get_parallel_devices(kind.parse_devices(devices))) > 1


class Sharded(ModelParallelStrategy):
    """FSDP2 whose checkpoints are those of one device, written and read by the plugin for them.

    (Lightning's own are single files, know parameters by a number of their own, and are restored
    behind `on_fit_start`.)
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint

    def connect(self, model: L.LightningModule) -> None:
        """Refuses what does not `divide`.

        Raises:
            UserError: a CLIP, or whatever else is not a stage.
        """
        if not is_overridden("configure_model", model):
            raise UserError(
                f"trainer=fsdp divides stages, not a {type(model).__name__}: leave it out (DDP)"
            )
        super().connect(model)

    def divide(self, module: L.LightningModule) -> None:
        """Leaves its share of each parameter to each rank; all begin with those of rank 0."""
        module.to(memory_format=torch.contiguous_format)  # shares are rows
        for tensor in chain(module.parameters(), module.buffers()):
            first = tensor.detach().to(self.root_device)
            dist.broadcast(first, src=0)
            tensor.detach().copy_(first)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        # Blocks are gathered in bfloat16, in which autocast would have them anyway; what lies
        # outside (embeddings, norms, places) is little, and is added to in float32.
        half = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in divided(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # Shares again behind each entrance: what was gathered would outlive a change of the shares.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for name in ENTRANCES:
            register_fsdp_forward_method(module, name)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Refuses what computes with whole rows and columns.

        Raises:
            UserError: Adafactor.
        """
        super().setup_optimizers(trainer)
        if any(isinstance(optimizer, torch.optim.Adafactor) for optimizer in self.optimizers):
            raise UserError(
                "trainer=fsdp: torch's Adafactor cannot work on shares of a weight; set "
                "optim=adamw, or leave trainer=fsdp out (DDP)"
            )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = checkpoint["state_dict"]
        state = {k: placed(v, own[k]) if k in own else v for k, v in state.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return whole(ParallelStrategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {k: placed(v, trained[i]) if v.ndim else v for k, v in moments.items()}
                for i, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def divided(module: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters are gathered together: those that their own `forward` enters.

    (Of a bare layer in a list, another module may read the weight.)
    """
    return [block for block in blocks(module) if any(True for _ in block.children())]
