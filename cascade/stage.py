"""A stage: a conditional generative model of x, given the keys that earlier stages wrote.

Every stage is this one class; stages differ in the objects that they are composed of.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.adapters.adapter import Adapter
from cascade.batch import Batch, hint_key, weight_key
from cascade.conditioning import Cond, Conditioner
from cascade.data.degradations import Corruption
from cascade.data.loading import on
from cascade.diffusion.sampling import Watch
from cascade.draws import Draws
from cascade.encoders import phrases
from cascade.encoders.identity import Encoder, differs
from cascade.encoders.weights import check_tensors, reading
from cascade.errors import UserError
from cascade.files.atomic import write_atomically
from cascade.losses.watched import Watched
from cascade.nets.control import ControlNet, Steered, Steering
from cascade.nets.dtensors import whole
from cascade.nets.layers import altered
from cascade.nets.prior import Places
from cascade.roles import Asked, Objective, Sampler, Teacher
from cascade.trainable import FURTHER, Trainable

WEIGHTS = "weights.safetensors"


def warmup_cosine(images: int, warmup: int, total: int) -> float:
    """Learning-rate factor after `images` images: linear warm-up times half a cosine to zero."""
    return warmup_constant(images, warmup) * 0.5 * (1 + math.cos(math.pi * min(1, images / total)))


def warmup_constant(images: int, warmup: int) -> float:
    """Learning-rate factor after `images` images: linear warm-up, then 1 (Imagen)."""
    return min(1.0, (images + 1) / max(1, warmup))


class Stage(Trainable):
    """One generative stage of a cascade.

    Args:
        codec: converts between x0 and the batch key that the stage writes.
        conditioner: embeds the keys that the stage reads.
        net: F(x, logsnr, cond).
        process: the loss and the denoiser.
        sampler: every decision of sampling.
        optimizer: creates an optimizer for the parameters.
        learning_rate: factor of the learning rate after a number of images; None: constant.
        batch: global batch size, to count images.
        corruption: corrupts the low-resolution input, if there is one.
        encoders: frozen encoders and tokenizers, which add the keys that the conditioner reads.
        seed: seed of all draws in training.
        control: creates ControlNets for the network, by the names of their conditions. They alone
            are trained; the rest is frozen.

    Attributes:
        weaker: for sampling only: a stage trained on the same data and with the same process, which
            guidance extrapolates away from (autoguidance, 2406.02507). None: guidance uses this
            stage's own network without its conditions.
        teacher: shows a student what to learn, or a stage that is personalized what to keep.
        adapter: an addition that alone is trained, and that `export` writes instead of weights.
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
        control: Mapping[str, Callable[[nn.Module], ControlNet]] | None = None,
    ):
        super().__init__(optimizer, learning_rate, batch)
        self.codec: Any = codec
        self.process: Any = process
        self.encoders: tuple[Any, ...] = tuple(encoders)
        self.conditioner, self.net = conditioner, net
        self.sampler, self.corruption = sampler, corruption
        self.seed = seed
        made = {name: make(net) for name, make in (control or {}).items()}
        if made:
            self.requires_grad_(False)
        self.control: Any = nn.ModuleDict(made)
        self.weaker: Stage | None = None
        self.teacher: Teacher | None = None
        self.adapter: Adapter | None = None
        self._empty: Batch | None = None  # one row, encoded from an empty caption

    @property
    def reads(self) -> frozenset[str]:
        """The batch keys that sampling needs."""
        made = frozenset().union(*(encoder.writes for encoder in self.encoders))
        needed = frozenset().union(*(encoder.reads for encoder in self.encoders))
        return (self.conditioner.reads - made - self.conditioner.extents) | needed

    @property
    def writes(self) -> str:
        """The batch key that sampling gives."""
        return self.codec.writes

    @property
    def frozen(self) -> tuple[Any, ...]:
        return (*self.encoders, *getattr(self.codec, "frozen", ()))

    @property
    def leads_away(self) -> bool:
        """Whether guidance leads away from a negative caption, if there is one."""
        return self.sampler.scale != 1 and "caption" in (self.weaker or self).conditioner.sources

    @property
    def unit(self) -> bool:
        """Whether CLIP embeddings that it samples have unit norm."""
        return getattr(self.codec, "unit", True)

    def encoded(self, batch: Batch) -> Batch:
        """Adds the keys that the encoders write, unless they were precomputed, and sizes and crops.

        If a dropped caption is replaced by the empty one, that is added as well, as `empty`.
        """
        for encoder in self.encoders:
            if not encoder.writes <= batch.keys():
                batch = phrases.encoded(encoder.to(self.device), batch)
        if self.conditioner.extents - batch.keys():
            batch = self.conditioner.complete(batch, self.codec.shape(batch))
        if not self.conditioner.empty_caption:
            return batch
        if self._empty is None:
            self._empty = {"caption": [""]}
            for encoder in self.encoders:
                self._empty = encoder.to(self.device)(self._empty)
        return {**batch, "empty": on(self._empty, self.device)}

    def loss(self, batch: Batch) -> Float[Tensor, " b"]:
        """The loss of each sample, whose draws depend only on (seed, sample number).

        If the condition holds a sketch of x0, its mean squared error is added, and so are the
        losses that were attached.
        """
        x0, batch = self._task(batch)
        cond = self.conditioner(batch, self.draws("drop", batch))
        lesson = None if self.teacher is None else self.teacher(batch, self)
        taught = () if lesson is None else (lesson.process,)
        net = self.noisy(batch, partial(self.draws, "augmentation", batch))
        attached: dict[str, Any] = dict(self.further.items())
        if attached:
            net = Watched(net, [block for one in attached.values() for block in one.watched])
        loss = self.process.loss(net, x0, cond, self.draws("noise", batch), *taught)
        if cond.sketch is not None:
            wanted = x0
            if lesson is not None and lesson.sketch is not None:
                wanted = x0.index_put((lesson.rows,), lesson.sketch)
            loss = loss + (cond.sketch - wanted).square().flatten(1).mean(1)
        for name, further in attached.items():
            term = further(self, batch, x0, net.call)
            self.terms[name] = term.detach().mean() if further.active(self.done) else None
            loss = loss + term
        return loss

    def attach(self, name: str, further: Any) -> None:
        """Adds a loss (`cascade.losses`) for the training; raises as its `attached` does."""
        self.further[name] = further.attached(self)

    def adapt(self, adapter: Adapter) -> None:
        """Freezes the stage but for what an adapter adds; raises as its `attached` does."""
        self.requires_grad_(False)
        self.adapter = adapter.attached(self)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        loss = self.loss(batch)
        return (loss * batch["loss_weight"] if "loss_weight" in batch else loss).mean()

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Lets the process measure the trained network, if it does so (Analytic-DPM).

        Args:
            batches: training batches; the process takes as many as it needs.
        """

        def examples() -> Iterator[tuple[Tensor, Cond, Draws]]:
            for batch in batches:
                batch = self.encoded(on(batch, self.device))
                x0, batch = self._task(batch)
                yield x0, self.conditioner(batch), self.draws("measure", batch)

        self.process.measure(self.net, examples())

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        seed: int,
        purpose: str = "",
        progress: Watch | None = None,
        without: Collection[str] = (),
    ) -> Tensor:
        """Samples the key that this stage writes.

        A sample's draws depend only on (seed, stage, purpose, `sample`), so neither the batch size
        nor the other samples change it.

        Args:
            batch: holds `sample` and all keys that the stage reads.
            purpose: distinguishes several draws for one sample (`BestOf`).
            progress: called in each step, with the codec's x0.
            without: sources ("caption", "clip_image") to drop.
        """
        asked = self.asked(batch, seed, purpose, without)
        return self.codec.decode(self.sampler(self.process, *asked, progress))

    @torch.no_grad()
    def asked(
        self, batch: Batch, seed: int, purpose: str = "", without: Collection[str] = ()
    ) -> Asked:
        """What the sampler is asked for; arguments as of `sample`."""
        name, given = f"{self.writes}/{purpose}", batch
        if self.corruption:
            noise = Draws(seed, f"{name}/corruption", given["sample"], self.device)
            given = self.corruption(given, noise, training=False)
        batch = self.encoded(given)
        noise = Draws(seed, f"{name}/noise", batch["sample"], self.device)
        shape = (len(batch["sample"]), *self.codec.shape(batch))
        cond = self.conditioner(batch, without=without)
        samples = batch["sample"]
        net = self.noisy(batch, lambda: Draws(seed, f"{name}/augmentation", samples, self.device))
        weaker = self.weaker_on(given, batch, net, without) if self.sampler.scale != 1 else None
        return Asked(net, shape, cond, weaker, noise)

    def altered(self, **parts: Any) -> "Stage":
        """A copy with the same parameters, and with other `parts` (sampler, net, codec...)."""
        return altered(self, **parts)

    def export(self, run: Path) -> None:
        """Writes the current weights, or those of its adapter alone. All ranks must call it."""
        state = whole(self.state_dict())
        if self.rank > 0:
            return
        kept = {k: v for k, v in state.items() if not k.startswith(FURTHER)}
        state = {k: v.detach().contiguous() for k, v in kept.items()}
        if self.adapter is not None:
            self.adapter.export(self, state, run)
            return
        about = {"encoders": json.dumps([encoder.hash for encoder in self.frozen])}
        write_atomically(run / WEIGHTS, lambda path: save_file(state, path, about))

    def restore(self, run: Path, of: str | None = None) -> None:
        """Loads what `export` wrote.

        Args:
            of: what this module is, for the message, if it begins with the weights of another run.
                ControlNets that it lacks begin as copies of the network. None: the run's own.

        Raises:
            UserError: there are no weights, or they belong to another configuration or encoder.
        """
        path = run / WEIGHTS
        if not path.exists():
            if found := sorted(run.glob("*.safetensors")):
                raise UserError(
                    f"{run} holds {found[0].name} alone, for the run that it began with: name it "
                    "among the words or adapters of that run in cascade.yaml"
                )
            raise UserError(f"{run} holds no {WEIGHTS}: train it first")
        with reading([path], str(run)), safe_open(path, framework="pt") as file:
            theirs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        if "encoders" not in about:
            raise UserError(f"{path} does not name the encoders of its stage: train it here")
        # Older weights have no version of their table of positions: `Places` falls back.
        own = self.state_dict()
        own = {k: v for k, v in own.items() if k in theirs or not k.endswith(Places.KEY)}
        known = {tuple(key.split(".")[:2]) for key in theirs}
        new = [n for n in self.control if of is not None and ("control", n) not in known]
        own = {
            k: v for k, v in own.items() if not k.startswith(tuple(f"control.{n}." for n in new))
        }
        check_tensors(own, theirs, str(path), of or f"{run}/config.yaml")
        for encoder, noted in zip(self.frozen, json.loads(about["encoders"])):
            if why := differs(encoder, noted):
                raise UserError(
                    f"{run} was trained with another encoder than {encoder.name} now is ({why}): "
                    "train it again, or put the old encoder back"
                )
        self.load_state_dict(theirs, strict=not new)
        for name in new:
            self.control[name].begin(self.net)
        if note := self.note:
            print(f"{run}: {note}")

    @property
    def note(self) -> str:
        """A warning about weights of an older version; empty for others."""
        if all(m.fixed for m in self.modules() if isinstance(m, Places)):
            return ""
        return (
            "weights of an older version, used as they were trained: a sample depends slightly on "
            "the longest caption in its batch; newly trained weights do not"
        )

    def noisy(self, batch: Batch, draws: Callable[[], Draws]) -> Any:
        """The network, steered by the conditions in the batch.

        It may get fresh noise in its picture at each call (`Corruption`).
        """
        by = []
        for name, control in self.control.items():
            if (picture := batch.get(hint_key(name, control.size))) is not None:
                weight = batch.get(weight_key(name), torch.ones(len(picture), device=self.device))
                by.append(Steering(control, control.hint(picture), weight))
        net = Steered(self.net, by) if by else self.net
        return self.corruption.around(net, batch, draws) if self.corruption else net

    def weaker_on(
        self, given: Batch, encoded: Batch, net: Any, without: Collection[str] = ()
    ) -> tuple[Any, Cond]:
        """The network and condition that guidance extrapolates away from.

        That is `weaker`, told the same as this stage, or this stage, told nothing. With negative
        captions in the batch, it is told these alone.

        Args:
            net: this stage's network, as it is sampled (`noisy`).
        """
        other = self.weaker or self
        if "negative" in given and "caption" in other.conditioner.sources.difference(without):
            rest = other.conditioner.sources - {"caption"}
            away = other.encoded(phrases.away_from(given, other.encoders))
            return net if other is self else other.net, other.conditioner(away, without=rest)
        if self.weaker is None:
            return net, self.conditioner.null(encoded)
        return other.net, other.conditioner(other.encoded(given), without=without)

    def _task(self, batch: Batch) -> tuple[Tensor, Batch]:
        """x0, and the batch with its low-resolution picture corrupted for training."""
        x0 = self.codec.encode(batch)
        if self.corruption:
            batch = self.corruption(batch, self.draws("corruption", batch), training=True)
        return x0, batch

    def draws(self, purpose: str, batch: Batch) -> Draws:
        return Draws(self.seed, f"{self.writes}/{purpose}", batch["sample"], self.device)
