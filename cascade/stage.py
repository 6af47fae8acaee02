"""A stage: a conditional generative model of x, given what earlier stages wrote.

All stages are this one class; they differ in the objects that they are made of.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.conditioning import Batch, Cond, Conditioner
from cascade.data.degradations import Corruption
from cascade.draws import Draws
from cascade.encoders.identity import differs
from cascade.encoders.weights import check_tensors, reading
from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.nets.prior import Places
from cascade.shares import whole

WEIGHTS = "weights.safetensors"


def warmup_cosine(images: int, warmup: int, total: int) -> float:
    """Learning-rate factor after `images`: linear warm-up, then half a cosine to zero."""
    return warmup_constant(images, warmup) * 0.5 * (1 + math.cos(math.pi * min(1, images / total)))


def warmup_constant(images: int, warmup: int) -> float:
    """Learning-rate factor after `images`: linear warm-up, then 1 (Imagen's stages)."""
    return min(1.0, (images + 1) / max(1, warmup))


@runtime_checkable
class Encoder(Protocol):
    """Adds keys to a batch: a frozen text encoder, a tokenizer. Not a module of its stage.

    It has a `name`, a `hash` of its weights and architecture, what versions noted that hashed the
    weights alone (`former`), and the batch keys that it `reads` and `writes`.
    """

    def to(self, device: torch.device) -> "Encoder": ...

    def __call__(self, batch: Batch) -> Batch: ...


@runtime_checkable
class Objective(Protocol):
    """What a stage trains with: a diffusion's `Process`, or the next of some tokens."""

    def loss(self, net: Any, x0: Tensor, cond: Cond, noise: Draws) -> Float[Tensor, " b"]: ...


@runtime_checkable
class Sampler(Protocol):
    """Draws x0; guidance of any scale but 1 leads away from a weaker (network, condition)."""

    scale: float

    def __call__(
        self,
        process: Objective,
        net: Any,
        shape: tuple[int, ...],
        cond: Cond,
        weaker: tuple[Any, Cond] | None,
        noise: Draws,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor: ...


class Stage(L.LightningModule):
    """One generative stage of a cascade.

    Args:
        codec: what x is, and the batch key that it is written to.
        conditioner: what is read.
        net: F(x, logsnr, cond).
        process: its loss and its denoiser.
        sampler: every decision of sampling.
        optimizer: makes an optimizer of the parameters.
        learning_rate: factor of the learning rate after so many images (None: constant).
        batch: global batch size, for counting images.
        corruption: of the low-resolution input, if there is one.
        encoders: frozen, or tokenizers: what they make of the caption, the stage reads.
        seed: of all draws of training.

    Attributes:
        weaker: set for sampling only: a stage trained on the same data and with the same process,
            which guidance leads away from (autoguidance, 2406.02507). None: from this stage's own
            network, told nothing.
    """

    def __init__(
        self,
        codec: nn.Module,
        conditioner: Conditioner,
        net: nn.Module,
        process: Objective,
        sampler: Sampler,
        optimizer: Callable[..., torch.optim.Optimizer],
        learning_rate: Callable[[int], float] | None = None,
        batch: int = 1,
        corruption: Corruption | None = None,
        encoders: Sequence[Encoder] = (),
        seed: int = 0,
    ):
        super().__init__()
        self.codec, self.conditioner, self.net = codec, conditioner, net
        self.process, self.sampler, self.corruption = process, sampler, corruption
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.batch, self.seed, self.encoders = batch, seed, tuple(encoders)
        self.weaker: Stage | None = None

    @property
    def reads(self) -> frozenset[str]:
        """The batch keys that sampling needs."""
        made = frozenset().union(*(encoder.writes for encoder in self.encoders))
        needed = frozenset().union(*(encoder.reads for encoder in self.encoders))
        return (self.conditioner.reads - made) | needed

    @property
    def writes(self) -> str:
        """The batch key that sampling gives."""
        return self.codec.writes

    def completed(self, batch: Batch) -> Batch:
        """The batch with what the encoders make of it; what was precomputed is taken as theirs."""
        for encoder in self.encoders:
            if not encoder.writes <= batch.keys():
                batch = encoder.to(self.device)(batch)
        return batch

    def on_after_batch_transfer(self, batch: Batch, _: int) -> Batch:
        return self.completed(batch)

    def loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The loss of each sample; its draws depend on (seed, sample number) alone.

        A sketch of x0 in the condition adds its own mean squared error.
        """
        x0, batch = self._task(batch)
        cond = self.conditioner(batch, self._draws("drop", batch))
        loss = self.process.loss(self.net, x0, cond, self._draws("noise", batch))
        if cond.sketch is None:
            return loss
        return loss + (cond.sketch - x0).square().flatten(1).mean(1)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return self.loss(batch).mean()

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Lets a process that has a `measure` look at the trained network (Analytic-DPM).

        Args:
            batches: as training sees them; as many are taken as the process wants.
        """

        def examples() -> Iterator[tuple[Tensor, Cond, Draws]]:
            for batch in batches:
                batch = self.completed(self.transfer_batch_to_device(batch, self.device, 0))
                x0, batch = self._task(batch)
                yield x0, self.conditioner(batch), self._draws("measure", batch)

        self.process.measure(self.net, examples())

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        seed: int,
        purpose: str = "",
        progress: Callable[[int, int], None] | None = None,
        without: Collection[str] = (),
    ) -> Tensor:
        """What this stage writes, for each sample of the batch.

        A sample's draws depend on (seed, stage, purpose, `sample`) alone.

        Args:
            batch: holds `sample` and all that the stage reads.
            purpose: tells several draws of one sample apart (`BestOf`).
            progress: called with (steps done, steps in all).
            without: sources ("caption", "clip_image") that the stage is not told.
        """
        name, given = f"{self.writes}/{purpose}", batch
        if self.corruption:
            noise = Draws(seed, f"{name}/corruption", given["sample"], self.device)
            given = self.corruption(given, noise, training=False)
        batch = self.completed(given)
        noise = Draws(seed, f"{name}/noise", batch["sample"], self.device)
        shape = (len(batch["sample"]), *self.codec.shape(batch))
        guided, other = self.sampler.scale != 1, self.weaker
        weaker = None
        if guided and other is None:
            weaker = self.net, self.conditioner.null(batch)
        elif guided:
            weaker = other.net, other.conditioner(other.completed(given), without=without)
        x0 = self.sampler(
            self.process,
            self.net,
            shape,
            self.conditioner(batch, without=without),
            weaker,
            noise,
            progress,
        )
        return self.codec.decode(x0)

    def export(self, run: Path) -> None:
        """Writes the weights as they are now to `weights.safetensors`; all ranks must call it."""
        state = whole(self.state_dict())
        if self.global_rank > 0:
            return
        state = {k: v.detach().contiguous() for k, v in state.items()}
        about = {"encoders": json.dumps([encoder.hash for encoder in self.encoders])}
        write_atomically(run / WEIGHTS, lambda path: save_file(state, path, about))

    def restore(self, run: Path) -> None:
        """Loads what `export` wrote.

        Raises:
            UserError: there are no weights, or they are those of another configuration.
        """
        path = run / WEIGHTS
        if not path.exists():
            raise UserError(f"{run} holds no {WEIGHTS}: train it first")
        with reading([path], str(run)), safe_open(path, framework="pt") as file:
            theirs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        if "encoders" not in about:
            raise UserError(f"{path} does not name the encoders of its stage: train it here")
        # Older runs have no version of their positions.
        own = self.state_dict()
        own = {k: v for k, v in own.items() if k in theirs or not k.endswith(Places.KEY)}
        check_tensors(own, theirs, str(path), f"{run}/config.yaml")
        for encoder, noted in zip(self.encoders, json.loads(about["encoders"])):
            if why := differs(encoder, noted):
                raise UserError(
                    f"{run} was trained with another encoder than {encoder.name} now is ({why}): "
                    "train it again, or put the old encoder back"
                )
        self.load_state_dict(theirs)
        if note := self.note:
            print(f"{run}: {note}")

    @property
    def note(self) -> str:
        """What is to be said of the weights; empty if nothing is."""
        if all(m.fixed for m in self.modules() if isinstance(m, Places)):
            return ""
        return (
            "weights of an older version, used as they were trained: a sample depends a little on "
            "the longest caption in its batch; one trained anew does not"
        )

    def on_fit_start(self) -> None:
        if note := self.note:  # a checkpoint was loaded
            self.print(note)

    def configure_model(self) -> None:
        """Lets a strategy that divides parameters among ranks do so."""
        if divide := getattr(self.trainer.strategy, "divide", None):
            divide(self)

    def configure_optimizers(self):
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.learning_rate is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.learning_rate(step * self.batch)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _task(self, batch: Batch) -> tuple[Tensor, Batch]:
        """x0, and the batch with its low-resolution picture corrupted as in training."""
        x0 = self.codec.encode(batch)
        if self.corruption:
            batch = self.corruption(batch, self._draws("corruption", batch), training=True)
        return x0, batch

    def _draws(self, purpose: str, batch: Batch) -> Draws:
        return Draws(self.seed, f"{self.writes}/{purpose}", batch["sample"], self.device)
