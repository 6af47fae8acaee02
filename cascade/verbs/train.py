"""`cascade train`: one stage, from a composed configuration to a run directory.

A run directory is the run's identity: the same command again goes on where it was, or says that
it is finished. It holds config.yaml, status.json, metrics.csv, tensorboard/, samples/,
checkpoints/ and the average's weights.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from cascade.conditioning import Batch
from cascade.data.embeddings import Embeddings
from cascade.data.lease import Lease, lease
from cascade.data.preflight import preflight
from cascade.data.shards import Shards
from cascade.data.splits import ALL, TRAIN, NothingHeldOut, canonical
from cascade.data.stream import Stream, loader
from cascade.done import DONE, STATUS, finished, is_first_rank
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.files import check_writable
from cascade.stage import Stage
from cascade.training.agreement import check, verify
from cascade.training.callbacks import History, SampleGrids
from cascade.training.checkpoint import (
    Checkpoint,
    CheckpointFolders,
    Checkpoints,
    newest_checkpoint,
)
from cascade.training.ema import EMA
from cascade.training.guard import Guard, RollBack, passed_over
from cascade.training.interruption import Interruption, deaf, stoppable
from cascade.training.precision import Bfloat16
from cascade.training.seeding import Seeding
from cascade.training.skips import Skips
from cascade.training.surroundings import Surroundings, as_begun
from cascade.training.watchdog import Watchdog
from cascade.verbs.checks import check_identity, replaced, shares
from cascade.verbs.configuration import built, composed, loaded, saved
from cascade.verbs.sending import LAUNCHER, send, split


class ShardData(L.LightningDataModule):
    """Training batches from sample number `start` on."""

    def __init__(self, shards: Shards | Stream, batch: int, start: int, workers: int):
        super().__init__()
        self.shards, self.batch, self.start, self.workers = shards, batch, start, workers

    def train_dataloader(self):
        data = loader(
            self.shards,
            self.batch,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            start=self.start,
            workers=self.workers,
        )
        data.worker_init_fn = deaf
        return data


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


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Returns what a training has left: its status and the average's weights."""
    own, overrides = split(args.overrides, [LAUNCHER])
    if args.config and args.overrides:
        raise UserError(f"--config {args.config} is whole: it takes no overrides")
    if own and args.show:
        raise UserError(f"--show prints what is trained, not how it is sent: leave {own[0]} out")
    if own:
        send(own, overrides)
        return []
    config = loaded(Path(args.config)) if args.config else composed("train", overrides)
    if args.show:
        print(OmegaConf.to_yaml(config))
        return []
    folder = run(config)
    weights = [*folder.glob("*.safetensors")]
    if not weights and is_first_rank():
        raise UserError(
            f"{folder} has seen all its images, but its weights are gone: choose another run=..., "
            "or remove that folder to train anew"
        )
    return [folder / STATUS, *weights]


def run(config: DictConfig) -> Path:
    """Trains what `config` describes, or goes on with it. Returns the run directory.

    Raises:
        UserError: among others, another process is at work in the run directory.
        Superseded: another process has taken it over.
    """
    folder = Path(config.run)
    _check_processes(config.trainer)
    if min(config.batch, config.images) < 1:
        raise UserError(f"batch={config.batch} images={config.images}: both are at least 1")
    check_identity(config, folder)
    if finished(folder, config.images):
        print(f"{config.name}: finished before ({folder})")
        return folder
    check_writable(folder, "choose another run=...")
    with stoppable(folder), lease(folder) if is_first_rank() else nullcontext() as held:
        while True:
            try:
                return _attempt(config, held)
            except RollBack as jump:
                rank_zero_only(print)(f"{config.name}: {jump}")


def _attempt(config: DictConfig, held: Lease | None) -> Path:
    """Trains to the end, or until it has to go back; the first rank holds the run's lease."""
    folder = Path(config.run)
    if held:
        (folder / DONE).unlink(missing_ok=True)
    _quiet()
    torch.manual_seed(config.seed)
    module = built(config.stage)
    checkpoint = newest_checkpoint(folder)
    shards = _checked_data(config, module, checkpoint)
    if not checkpoint and isinstance(module, Stage):
        # Lazily: pixels need no statistics, and so no pictures.
        module.codec.fit(map(module.completed, _first_batches(shards, config.fit_images)))
    rank_zero_only(saved)(config, folder / "config.yaml")
    step, start = (checkpoint.step, checkpoint.consumed) if checkpoint else (0, 0)
    start = max(start, passed_over(folder))
    trainer = _trainer(config, _callbacks(config, held, module, shards, step, start))
    share, trainer.accumulate_grad_batches = shares(
        config.batch, config.micro_batch, trainer.world_size
    )
    data = ShardData(shards, share, start, config.workers)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    module.to(memory_format=torch.channels_last)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint and str(checkpoint.path), weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None
    return folder


def _check_processes(trainer: DictConfig) -> None:
    """Raises UserError if Slurm starts other processes than the trainer is told of."""
    if not _by_srun():
        return
    tasks, nodes = (int(os.environ.get(key, 1)) for key in ("SLURM_NTASKS", "SLURM_NNODES"))
    each = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    devices = torch.cuda.device_count() or 1 if trainer.devices == "auto" else trainer.devices
    devices = len(devices) if isinstance(devices, ListConfig) else int(devices)
    if (tasks, nodes, each) != (trainer.num_nodes * devices, trainer.num_nodes, devices):
        per_node = -(-tasks // nodes)
        raise UserError(
            f"Slurm has {tasks} tasks on {nodes} nodes for this, and trainer.devices={devices} "
            f"trainer.num_nodes={trainer.num_nodes}: start it with srun --nodes={nodes} "
            f"--ntasks-per-node={per_node} and trainer.devices={per_node} "
            f"trainer.num_nodes={nodes}, or leave it to launcher=slurm"
        )


def _checked_data(
    config: DictConfig, module: L.LightningModule, checkpoint: Checkpoint | None
) -> Shards | Stream:
    """The training data, when it fits the module: in seconds, and before a device is taken."""
    if isinstance(module, Stage):
        named = {k: config.clip.get(k) for k in ("checkpoint", "quick_gelu")}
        clip = FrozenCLIP(config.clip.path, **named)
        fields = [f for f, p in (config.data.get("captions") or {"txt": 1.0}).items() if p > 0]
        crop, several = config.data.pictures.get("crop"), config.data.get("several")
        check(module, _stores(config), clip, crop, fields, several)
    shards = as_begun(checkpoint, lambda **options: built({**config.data, **options}))
    if isinstance(shards, Shards):
        preflight(shards, config.batch)
        if isinstance(module, Stage):
            verify(shards.showing, shards.embeddings, module.encoders, clip)
    return shards


def _callbacks(
    config: DictConfig,
    held: Lease | None,
    module: L.LightningModule,
    shards: Shards | Stream,
    step: int,
    start: int,
) -> list[L.Callback]:
    """All of a run that goes on behind `step`, with sample number `start`; their order counts."""
    folder, ema, offset = Path(config.run), EMA(config.ema), start - step * config.batch
    checkpoints = Checkpoints(folder, ema, config.images, config.save_seconds, step, offset)
    callbacks = [Watchdog(folder, config.watchdog), *built(config.get("faults") or {}).values()]
    callbacks += [Surroundings(module, shards), Guard(folder, offset, config.spike), ema]
    if hasattr(getattr(module, "process", None), "measure"):
        callbacks.append(Measure(ema, loader(shards, 64)))
    callbacks += [Seeding(config.seed), History(folder, config.name, config.images)]
    if config.grids and hasattr(module, "sampler") and module.writes.startswith("image"):
        marks = [config.images * (i + 1) // config.grids for i in range(config.grids)]
        callbacks.append(SampleGrids(folder, ema, *_shown(config, shards), marks))
    skips = Skips(folder, shards.max_skip_fraction, checkpoints.save)
    return [*callbacks, skips, Interruption(folder, checkpoints, held), checkpoints]


def _trainer(config: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    cuda = torch.cuda.is_available()
    return L.Trainer(
        accelerator="cuda" if cuda else "cpu",
        max_steps=-(-config.images // config.batch),
        max_epochs=-1,
        gradient_clip_val=config.gradient_clip,
        callbacks=callbacks,
        plugins=[CheckpointFolders(), *([Bfloat16()] if cuda else []), *_slurm()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **built(config.trainer),
    )


def _slurm() -> list[SLURMEnvironment]:
    # Its requeueing saves within a signal handler, which deadlocks; `Interruption` does it.
    return [SLURMEnvironment(auto_requeue=False)] if _by_srun() else []


def _by_srun() -> bool:
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _stores(config: DictConfig) -> list[Embeddings]:
    return list(built(config.data.get("embeddings") or {}).values())


def _first_batches(shards: Shards | Stream, images: int) -> Iterable[Batch]:
    count = min(images, len(shards)) if isinstance(shards, Shards) else images
    return loader(shards, 256, batches=-(-count // 256))


def _shown(config: DictConfig, data: Shards | Stream, count: int = 16) -> tuple[Batch, str]:
    """Held-out samples to paint; where nothing is held out, some of the training, and so labelled.

    Raises:
        UserError: the shards lack another split that was asked for.
    """
    # What is sampled from is whole: BSR degrades in training only.
    pictures = {**config.data.pictures, "degrade": None}
    as_sampled = {"split": config.grid_split, "shuffle": False, "pictures": pictures}
    # Nothing is kept of them; a stream that is not shuffled ends by itself.
    own = {k: v for k, v in {**config.data, **as_sampled}.items() if k != "cache"}
    trained = canonical(config.grid_split) in (TRAIN, ALL)
    try:
        shards = built(own)
        # Held out by an index since, while the training had it from the beginning.
        late = isinstance(shards, Shards) and shards.corpus.share > data.corpus.share
    except NothingHeldOut:
        late = True
    if late:
        trained, shards = True, built({**own, "split": config.data.get("split", TRAIN)})
    count = min(count, len(shards)) if isinstance(shards, Shards) else count
    return next(iter(loader(shards, count, batches=1))), "training: " if trained else ""


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def load(folder: Path) -> Any:
    """The module that a run trained, with the average's weights, in `eval()` mode."""
    module = untrained(folder)
    module.restore(folder)
    return module.eval()


def untrained(folder: Path) -> Any:
    """The module that a run trains, as its configuration has it.

    Where the run was moved, its CLIP is looked for beside it (`restore` compares the weights).
    """
    config = loaded(folder / "config.yaml")
    stage, clip = OmegaConf.to_container(config.stage), Path(config.clip.path)
    beside = folder.parent / clip.name
    if not clip.exists() and beside.is_dir():
        stage = replaced(stage, str(clip), str(beside))
    return built(stage)
