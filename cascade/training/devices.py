"""What a Trainer needs to know of the machine: precision on CUDA, and the processes of Slurm."""

import os

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from omegaconf import DictConfig, ListConfig

from cascade.errors import UserError


class Bfloat16(MixedPrecision):
    """Autocast to bfloat16; parameters, gradients and moments stay in float32.

    Unlike Lightning's, it clips gradients for fused optimizers too: Lightning refuses to because a
    fused step may unscale gradients after clipping, but bfloat16 uses no gradient scaler.

    Args:
        device: type of the device.
    """

    clip_gradients = Precision.clip_gradients

    def __init__(self, device: str = "cuda"):
        super().__init__("bf16-mixed", device)


def plugins() -> list[Precision | SLURMEnvironment]:
    """Return the Trainer's plugins for this machine."""
    found: list[Precision | SLURMEnvironment] = [Bfloat16()] if torch.cuda.is_available() else []
    # Lightning's own requeueing saves within a signal handler, which deadlocks.
    return [*found, SLURMEnvironment(auto_requeue=False)] if _started_by_srun() else found


def check_processes(trainer: DictConfig) -> None:
    """Raise UserError if Slurm started other processes than `trainer` asks for."""
    if not _started_by_srun():
        return
    tasks, nodes = (int(os.environ.get(key, 1)) for key in ("SLURM_NTASKS", "SLURM_NNODES"))
    each = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    devices = torch.cuda.device_count() or 1 if trainer.devices == "auto" else trainer.devices
    devices = len(devices) if isinstance(devices, ListConfig) else int(devices)
    if (tasks, nodes, each) != (trainer.num_nodes * devices, trainer.num_nodes, devices):
        per_node = -(-tasks // nodes)
        raise UserError(
            f"Slurm started {tasks} tasks on {nodes} nodes, but trainer.devices={devices} "
            f"trainer.num_nodes={trainer.num_nodes}: start it with srun --nodes={nodes} "
            f"--ntasks-per-node={per_node} and trainer.devices={per_node} "
            f"trainer.num_nodes={nodes}, or use launcher=slurm"
        )


def _started_by_srun() -> bool:
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
