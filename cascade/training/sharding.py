"""Strategies for training on several devices: DDP by default, or FSDP2.

With DDP every rank holds everything, and gradients are averaged. With FSDP2 a rank holds a shard of
each parameter, gradient, moment and average (DTensors), and whole parameters are gathered one block
at a time. Checkpoints and weights hold whole, plain tensors, as from one device, so that any number
of ranks, with either strategy, can resume from them.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch import strategies
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from cascade.errors import UserError
from cascade.nets.cost import blocks
from cascade.nets.dtensors import placed, whole
from cascade.stage import Stage

# The methods of a stage that compute with whole parameters; all ranks call them together.
FORWARD_METHODS = ("training_step", "measure", "sample")


def replicated(
    devices: int | str | Sequence[int], num_nodes: int, seconds: float = 1800.0
) -> strategies.Strategy | str:
    """DDP on several devices, nothing on one.

    Args:
        devices, num_nodes: as for Lightning's Trainer.
        seconds: after which a rank gives up waiting for the others.
    """
    if not _several(devices, num_nodes):
        return "auto"
    # Every parameter gets a gradient on every rank, so there is no search for unused ones.
    # Gradients are views of the buckets that are reduced, rather than copies.
    return Replicated(timeout=timedelta(seconds=seconds), gradient_as_bucket_view=True)


def sharded(
    devices: int | str | Sequence[int], num_nodes: int, seconds: float = 1800.0
) -> strategies.Strategy | str:
    """FSDP2 on several devices, nothing on one; arguments as for `replicated`."""
    if not _several(devices, num_nodes):
        return "auto"
    return Sharded(timeout=timedelta(seconds=seconds))


def _several(devices: int | str | Sequence[int], num_nodes: int) -> bool:
    kind = CUDAAccelerator if torch.cuda.is_available() else CPUAccelerator
    if devices == "auto":
        devices = kind.auto_device_count()
    return num_nodes * len(kind.get_parallel_devices(kind.parse_devices(devices))) > 1


class Replicated(strategies.DDPStrategy):
    """DDP whose sums do not depend on how far a run has got, on CPUs.

    A reduction adds the numbers of more than two ranks in an order that depends on their places in
    DDP's buckets. DDP fills these anew after the first step of each process, so a run that was
    resumed would differ in the last bits from one that was not. Lightning registers hooks on GPUs
    alone, where the libraries promise no order anyway.
    """

    def _register_ddp_hooks(self) -> None:
        if self.root_device.type == "cpu":
            self.model.register_comm_hook(None, mean_by_rank)


def mean_by_rank(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks, added in their order (a hook of DDP)."""
    world, whole = dist.get_world_size(), bucket.buffer()
    # Divided first, as DDP itself does: two ranks get the same bits from either.
    parts = [torch.empty_like(whole) for _ in range(world)]
    dist.all_gather(parts, whole.div_(world))
    whole.copy_(parts[0])
    for part in parts[1:]:
        whole += part
    done = torch.futures.Future()
    done.set_result(whole)
    return done


class Sharded(strategies.ModelParallelStrategy):
    """FSDP2 with the checkpoints of one device, written and read by `CheckpointFolders`.

    Lightning's own strategy writes single files, names optimizer states differently, and restores
    them after `on_fit_start`.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = strategies.ParallelStrategy.save_checkpoint
    load_checkpoint = strategies.ParallelStrategy.load_checkpoint

    def connect(self, model: L.LightningModule) -> None:
        """Attach the module, which must be that of a stage.

        Raises:
            UserError: a CLIP, or any other module.
        """
        trained = getattr(model, "trained", model)
        if not isinstance(trained, Stage):
            raise UserError(
                f"trainer=fsdp shards stages, not a {type(trained).__name__}: omit it (DDP)"
            )
        super().connect(model)

    def divide(self, module: L.LightningModule) -> None:
        """Shard the parameters over the ranks, starting from those of rank 0."""
        module.to(memory_format=torch.contiguous_format)  # shards are rows
        for tensor in chain(module.parameters(), module.buffers()):
            first = tensor.detach().to(self.root_device)
            dist.broadcast(first, src=0)
            tensor.detach().copy_(first)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        # Blocks are gathered in bfloat16, to which autocast would convert them anyway. Parameters
        # outside blocks (embeddings, norms, positions) are few, and stay in float32.
        dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in divided(module):
            fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
        # Reshard after each call: gathered parameters would survive a change of their shards, such
        # as swapping in the average.
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for name in FORWARD_METHODS:
            fsdp.register_fsdp_forward_method(module, name)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Set the optimizers up, which must not need whole rows and columns.

        Raises:
            UserError: Adafactor, or SOAP.
        """
        super().setup_optimizers(trainer)
        for name in (type(optimizer).__name__ for optimizer in self.optimizers):
            if name in ("Adafactor", "SOAP"):
                raise UserError(
                    f"trainer=fsdp: {name} cannot work on shards of a weight; set optim=adamw, or "
                    "omit trainer=fsdp (DDP)"
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = checkpoint["state_dict"]
        state = {k: placed(v, own[k]) if k in own else v for k, v in state.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return whole(strategies.ParallelStrategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {k: placed(v, trained[i]) if v.ndim else v for k, v in moments.items()}
                for i, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def divided(module: nn.Module) -> list[nn.Module]:
    """Return the blocks whose parameters are gathered together when their `forward` is called.

    Bare layers in a list are excluded: another module may read their weights directly.
    """
    return [block for block in blocks(module) if any(True for _ in block.children())]
