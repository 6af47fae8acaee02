"""`cascade train`: one stage, from a composed configuration to a run directory.

A run directory is the run's identity: the same command again goes on where it was, or says that
it is finished. It holds config.yaml, status.json, metrics.csv, tensorboard/, samples/,
checkpoints/ and the average's weights.
"""

import argparse
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from cascade.conditioning import Batch
from cascade.data.embeddings import Embeddings
from cascade.data.shards import Shards, loader
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.stage import Stage
from cascade.training.agreement import check
from cascade.training.callbacks import History, SampleGrids
from cascade.training.checkpoint import (
    AtomicCheckpointIO,
    Checkpoints,
    finished,
    newest_checkpoint,
)
from cascade.training.ema import EMA
from cascade.verbs.configuration import built, composed, differences, loaded, saved

# What may change between two starts of the same run; the totals follow from `images`.
FREE = ("images", "run", "trainer", "workers", "grids", "micro_batch")
TOTALS = ("learning_rate.total", "stage.learning_rate.total")


class ShardData(L.LightningDataModule):
    """Training batches from sample number `start` on."""

    def __init__(self, shards: Shards, batch: int, start: int, workers: int):
        super().__init__()
        self.shards, self.batch, self.start, self.workers = shards, batch, start, workers

    def train_dataloader(self):
        return loader(
            self.shards,
            self.batch,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            start=self.start,
            workers=self.workers,
        )


class Measure(L.Callback):
    """Lets the process measure the trained network, behind the last step and before it is saved.

    Args:
        ema: the average, which is what is measured.
        batches: of training samples, without end.
    """

    def __init__(self, ema: EMA, batches: Iterable[Batch]):
        self.ema, self.batches = ema, batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == trainer.max_steps:
            with self.ema.applied(module):
                module.measure(self.batches)


def main(args: argparse.Namespace) -> None:
    config = composed("train", args.overrides)
    if args.show:
        print(OmegaConf.to_yaml(config))
    else:
        run(config)


def run(config: DictConfig) -> Path:
    """Trains what `config` describes, or goes on with it. Returns the run directory."""
    folder = Path(config.run)
    if min(config.batch, config.images) < 1:
        raise UserError(f"batch={config.batch} images={config.images}: both are at least 1")
    _check_identity(config, folder)
    if finished(folder) and loaded(folder / "config.yaml").images >= config.images:
        print(f"{config.name}: finished before ({folder})")
        return folder
    _quiet()
    torch.manual_seed(config.seed)
    module = built(config.stage)
    if isinstance(module, Stage):
        clip = FrozenCLIP(config.clip.path, config.clip.get("checkpoint"))
        check(module, _stores(config), clip, config.data.pictures.get("crop"))
    shards = built(config.data)
    checkpoint = newest_checkpoint(folder)
    if not checkpoint and isinstance(module, Stage):
        # Lazily: pixels need no statistics, and so no pictures.
        module.codec.fit(map(module.completed, _first_batches(shards, config.fit_images)))
    saved(config, folder / "config.yaml")
    ema = EMA(config.ema)
    callbacks = [ema]
    if hasattr(getattr(module, "process", None), "measure"):
        callbacks.append(Measure(ema, loader(shards, 64)))
    callbacks.append(Checkpoints(folder, ema, config.images, config.save_seconds))
    callbacks.append(History(folder, config.name, config.images))
    if config.grids and hasattr(module, "sampler") and module.writes.startswith("image"):
        marks = [config.images * (i + 1) // config.grids for i in range(config.grids)]
        callbacks.append(SampleGrids(folder, ema, _held_out(config), marks))
    trainer = _trainer(config, callbacks)
    step = checkpoint[1] if checkpoint else 0
    share, trainer.accumulate_grad_batches = shares(
        config.batch, config.micro_batch, trainer.world_size
    )
    data = ShardData(shards, share, step * config.batch, config.workers)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    module.to(memory_format=torch.channels_last)
    trainer.fit(module, data, ckpt_path=checkpoint and str(checkpoint[0]), weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return folder


def _trainer(config: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    cuda = torch.cuda.is_available()
    return L.Trainer(
        accelerator="cuda" if cuda else "cpu",
        precision="bf16-mixed" if cuda else "32-true",
        max_steps=-(-config.images // config.batch),
        max_epochs=-1,
        gradient_clip_val=config.gradient_clip,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **config.trainer,
    )


def shares(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Samples at a time on each rank, and over how many times gradients are accumulated.

    Raises:
        UserError: the batch is not ranks x micro_batch x a whole number.
    """
    micro_batch = micro_batch or max(1, batch // ranks)
    steps, rest = divmod(batch, ranks * micro_batch)
    if rest or not steps:
        raise UserError(
            f"batch={batch} is not ranks ({ranks}) x micro_batch ({micro_batch}) x a whole number: "
            "change batch or micro_batch"
        )
    return micro_batch, steps


def _check_identity(config: DictConfig, folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        return
    old = loaded(folder / "config.yaml")
    paths = {line: line.split(":")[0] for line in differences(old, config)}
    changed = [d for d, p in paths.items() if p.split(".")[0] not in FREE and p not in TOTALS]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with another configuration: {changed[0]}{more}; "
            "choose another run=..., or remove that folder"
        )


def _stores(config: DictConfig) -> list[Embeddings]:
    return list(built(config.data.get("embeddings") or {}).values())


def _first_batches(shards: Shards, images: int) -> Iterable[Batch]:
    return loader(shards, 256, batches=-(-min(images, len(shards)) // 256))


def _held_out(config: DictConfig, count: int = 16) -> Batch:
    # What is sampled from is whole: BSR degrades in training only.
    pictures = {**config.data.pictures, "degrade": None}
    as_sampled = {"cache": False, "split": config.grid_split, "shuffle": False}
    shards = built({**config.data, **as_sampled, "pictures": pictures})
    return next(iter(loader(shards, min(count, len(shards)), batches=1)))


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def load(folder: Path) -> Any:
    """The module that a run trained, with the average's weights, in `eval()` mode.

    Where the run was moved, its CLIP is looked for beside it (`restore` compares the weights).
    """
    config = loaded(folder / "config.yaml")
    stage, clip = OmegaConf.to_container(config.stage), Path(config.clip.path)
    beside = folder.parent / clip.name
    if not clip.exists() and beside.is_dir():
        stage = _replaced(stage, str(clip), str(beside))
    module = built(stage)
    module.restore(folder)
    return module.eval()


def _replaced(node: Any, old: Any, new: Any) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, old, new) for value in node]
    return new if node == old else node
