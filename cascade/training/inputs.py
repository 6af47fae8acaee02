"""The data of a run: checked before a device is taken, then given to training and sample grids."""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
from omegaconf import DictConfig

from cascade.batch import Batch
from cascade.codecs import Pixels
from cascade.config.compose import built
from cascade.data.few import Few
from cascade.data.loading import Loader, Samples, loader
from cascade.data.recaptions.reading import recaptions_of
from cascade.data.tars.splits import ALL, TRAIN, NothingHeldOut, canonical
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.stage import Stage
from cascade.trainable import Trainable
from cascade.training.callbacks.interruption import ignore_signals
from cascade.training.checkpoint import Checkpoint
from cascade.training.compatibility import check, verify
from cascade.training.provenance import as_begun


class TrainingData(L.LightningDataModule):
    """A rank's training batches from sample number `start` on.

    A data module, because ranks are known only once the Trainer has set up its processes.
    """

    def __init__(self, samples: Samples, batch: int, start: int, workers: int):
        super().__init__()
        self.samples, self.batch, self.start, self.workers = samples, batch, start, workers

    def train_dataloader(self) -> Loader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        data = loader(self.samples, self.batch, rank, world, start=self.start, workers=self.workers)
        data.worker_init_fn = ignore_signals
        return data


def training_samples(
    config: DictConfig, module: Trainable, checkpoint: Checkpoint | None
) -> Samples:
    """Build the training data, and check that it fits the module.

    Raises:
        UserError: sizes, encoders or embeddings do not fit, or training would fail on the samples.
    """
    if isinstance(module, Stage):
        options = {key: config.clip.get(key) for key in ("checkpoint", "quick_gelu")}
        clip = FrozenCLIP(config.clip.path, unit=config.clip.get("unit", True), **options)
        stores = list(built(config.data.get("embeddings") or {}).values())
        captions = config.data.get("captions") or {"txt": 1.0}
        fields = [field for field, rate in captions.items() if rate > 0]
        crop, several = config.data.pictures.get("crop"), config.data.get("several")
        recaptions = recaptions_of(config.data.get("recaptions"), fields)
        check(module, stores, clip, crop, fields, several, recaptions)
        _check_buckets(config, module)
    samples = as_begun(checkpoint, lambda **options: _samples(config, options))
    samples.check(config.batch)
    if isinstance(module, Stage):
        verify(samples.preview, samples.embeddings, module.encoders, clip)
    return samples


def _samples(config: DictConfig, options: dict[str, Any]) -> Samples:
    samples = built({**config.data, **options})
    if few := config.get("few"):
        return Few(samples, few.kept and built(few.kept), few.weight)
    return samples


def _check_buckets(config: DictConfig, stage: Stage) -> None:
    """Check that the stage is told what the data gives it, in the same shapes.

    Raises:
        UserError: of buckets, only some parts are set.
    """
    given = config.data.get("buckets")
    known = config.stage.codec.get("buckets") if isinstance(stage.codec, Pixels) else None
    if given != known:
        raise UserError(
            f"data.buckets={given}, but stage.codec.buckets={known}: set both, as buckets=plain "
            "does"
        )
    if stage.conditioner.extents and not given:
        told = ", ".join(sorted(stage.conditioner.extents))
        raise UserError(f"{config.name} is told {told}, which needs buckets: add buckets=sdxl")


def first_batches(samples: Samples, images: int) -> Iterable[Batch]:
    """Load the first `images` samples, at most an epoch, in batches; nothing is read before."""
    count = int(min(images, samples.samples_per_epoch))
    batch = math.gcd(256, samples.alike)
    return loader(samples, batch, batches=-(-count // batch))


def grid_samples(config: DictConfig, trained: Samples, count: int = 16) -> tuple[Batch, str]:
    """Load samples of the split `grid_split` for grids, and the label for their captions.

    Where nothing is held out they are training samples, which the label says.

    Raises:
        UserError: `grid_split` names another split, and the data lacks it.
    """
    # Whole pictures: BSR degrades in training only.
    pictures = {**config.data.pictures, "degrade": None}
    options = {"split": config.grid_split, "shuffle": False, "pictures": pictures}
    # Without a cache, as each is read once; squares, as a grid has pictures of one shape. A stream
    # that is not shuffled ends by itself.
    left_out = ("cache", "buckets")
    data = {k: v for k, v in {**config.data, **options}.items() if k not in left_out}
    unseen = canonical(config.grid_split) not in (TRAIN, ALL)
    try:
        samples = built(data)
        # The index may hold out pictures since, which this run has trained on from its beginning.
        held_out = samples.held_out <= trained.held_out
    except NothingHeldOut:
        held_out = False
    if not held_out:
        unseen, samples = False, built({**data, "split": config.data.get("split", TRAIN)})
    count = int(min(count, samples.samples_per_epoch))
    return next(iter(loader(samples, count, batches=1))), "" if unseen else "training: "
