"""The FLOPs and memory of a training step, found without allocating memory.

A module's own `training_step` and its backward pass run on fake tensors, which have shapes and
storages but no data. The batch size is a large prime, so the size of each storage reveals how it
depends on the batch, and one run serves every batch size. A FLOP is one addition or multiplication;
memory is in bytes.
"""

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cascade.batch import Batch
from cascade.trainable import Trainable

PRIME = 1009  # divides no width, length or side
GIB = 2**30


class Account(TorchDispatchMode):
    """Records the FLOPs within its context, by torch's rules, and the memory after each allocation.

    `events` holds bytes as (casts, constant, per sample, per pair): casts of the known tensors
    (autocast's copies of the weights), and storages whose size is proportional to the batch size to
    the power of 0, 1 and 2. (`FlopCounterMode` would keep tensors alive.)

    Args:
        known: tensors that existed before, which are not counted.
    """

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.flops, self.events = 0, [(0, 0, 0, 0)]
        self._alive = [0, 0, 0, 0]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # most calls are of this one
            return args[0].device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if rule := flop_registry.get(func.overloadpacket):
            self.flops += rule(*args, **kwargs, out_val=out)
        cast = func is torch.ops.aten._to_copy.default
        cast = cast and args[0].untyped_storage()._cdata in self._known
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), cast)
        return out

    def _count(self, storage: torch.UntypedStorage, cast: bool) -> None:
        key, size, kind = storage._cdata, storage.nbytes(), 0 if cast else 1
        # Sizes that depend on data (the number of distinct captions) are symbolic, and small.
        if key in self._known or key in self._counted or not isinstance(size, int):
            return
        while kind in (1, 2) and size and size % PRIME == 0:
            size, kind = size // PRIME, kind + 1
        self._counted.add(key)
        self._alive[kind] += size
        self.events.append(tuple(self._alive))
        weakref.finalize(storage, self._free, key, size, kind).atexit = False

    def _free(self, key: int, size: int, kind: int) -> None:
        self._counted.remove(key)
        self._alive[kind] -= size


@dataclass(frozen=True)
class Step:
    """The measurement of one training step.

    Args:
        flops: FLOPs of the whole step, per sample.
        events: see `Account`.
    """

    flops: float
    events: Float64[Tensor, "n 4"]

    def peak(self, batch: int, casts: bool = True) -> int:
        """Peak bytes besides weights and gradients, with or without the casts."""
        powers = torch.tensor([int(casts), 1, batch, batch**2], dtype=torch.float64)
        return int((self.events @ powers).max())


class Rehearsal:
    """Runs training steps of a module on fake tensors.

    Gradients exist throughout a step, as while micro-batches accumulate, and as DDP's buckets do.
    Attention is fused, so its weights are not stored.

    Args:
        module: a module on the meta device, which can only be rehearsed afterwards.
        batch: creates a batch of a number of samples.
    """

    def __init__(self, module: Trainable, batch: Callable[[int], Batch]):
        self.module, self.batch = module, batch
        self.blocks = blocks(module)
        self.switched = [m for m in module.modules() if isinstance(vars(m).get("checkpoint"), bool)]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        # Without data there are no sample numbers, and so no stream for each sample.
        module._draws = lambda purpose, batch: torch.randn
        with self._fake:
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    @cached_property
    def forward(self) -> float:
        """FLOPs per sample of the forward pass."""
        with self._fake, torch.no_grad(), Account() as account:
            self.module.loss(self.batch(PRIME))
        return account.flops / PRIME

    def step(self, bf16: bool = False, checkpointing: bool = False) -> Step:
        """Runs a training step, in float32 or as on a GPU with autocast to bfloat16.

        Args:
            checkpointing: turns on activation checkpointing, in networks that support it.
        """
        for network in self.switched:
            network.checkpoint = checkpointing
        parameters = list(self.module.parameters())
        gradients = [p.grad for p in parameters if p.requires_grad]
        account = Account([*parameters, *gradients, *self.module.buffers()])
        policy = norms_in_float32(self.module) if bf16 else nullcontext()
        with self._fake, policy, account:
            batch = self.batch(PRIME)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = self.module.training_step(batch, 0)
            loss.backward()
            self.module.after_backward()
        return Step(account.flops / PRIME, torch.tensor(account.events, dtype=torch.float64))


@contextmanager
def norms_in_float32(module: nn.Module) -> Iterator[None]:
    """Runs norms in float32, as autocast does on CUDA; on the CPU of fake tensors it does not."""
    norms = [m for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    hooks = [m.register_forward_pre_hook(lambda _, args: (args[0].float(),)) for m in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a module: entries of its module lists, nested ones included."""
    found = []
    for child in module.children():
        nested = not isinstance(module, nn.ModuleList) or isinstance(child, nn.ModuleList)
        found += blocks(child) if nested else [child]
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes on each device during training, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Way:
    """A way to train on several devices, each with its own batch.

    For each trained parameter AdamW stores two float32 numbers, and the average of the weights one.
    Sharding (ZeRO-3, FSDP) divides weights, gradients, optimizer and average among the devices. A
    device then also holds, in bfloat16, the parameters outside the blocks, the current block and
    the next one, and, in float32, the gradient that is about to be sharded.

    Args:
        rehearsal: the module.
        step: its measured step.
        shards: number of devices that share the state; 1: each holds all of it (DDP, or one
            device).
    """

    rehearsal: Rehearsal
    step: Step
    shards: int = 1

    def memory(self, batch: int) -> Memory:
        """The memory for a batch of this many samples on each device."""
        module = self.rehearsal.module
        state = [*module.parameters(), *module.buffers()]
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Memory(
            weights=sum(t.nbytes for t in state) // self.shards,
            gradients=4 * trained // self.shards,
            optimizer=8 * trained // self.shards,
            average=4 * trained // self.shards,
            gathered=self._gathered() if self.shards > 1 else 0,
            activations=self.step.peak(batch, casts=self.shards == 1),
        )

    def largest(self, limit: int) -> int:
        """The largest batch on each device whose total is at most `limit` bytes; 0 if none is."""
        return bisect_right(range(1, 2**20), limit, key=lambda batch: self.memory(batch).total)

    def _gathered(self) -> int:
        sizes = sorted(parameters(block) for block in self.rehearsal.blocks)
        outside = parameters(self.rehearsal.module) - sum(sizes)
        return 2 * (outside + sum(sizes[-2:])) + 4 * max([outside, *sizes[-1:]])


def parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def parts(module: nn.Module, name: str = "", depth: int = 2) -> Counter[str]:
    """The number of parameters by part, under its path; wrappers and dictionaries are skipped."""
    if depth == 0 or isinstance(module, nn.ModuleList):
        return Counter({name: parameters(module)})
    dot = f"{name}." if name else ""
    found = Counter({dot + k: p.numel() for k, p in module.named_parameters(recurse=False)})
    children = dict(module.named_children())
    # Below the top, a module that only wraps another has no line of its own.
    wraps = name and len(children) == 1 and not found and not isinstance(module, nn.ModuleDict)
    for key, child in children.items():
        if wraps or isinstance(child, nn.ModuleDict):
            found += parts(child, name, depth)
        else:
            found += parts(child, dot + key, depth - 1)
    return found
