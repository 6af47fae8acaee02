"""Training on one page: from a configuration to a finished run directory.

`train` claims the run directory and restarts after rollbacks; `_attempt` builds the data, the
module, the callbacks and the Trainer, and fits; `_callbacks` says what happens around each step, in
which order and why. The step itself is `Stage.training_step`, its loss `Process.loss`, the order of
samples `cascade.data.order`, and a checkpoint's content `cascade.training.checkpoint`.

The run directory identifies the run: the same command resumes it, or says that it is finished. It
holds config.yaml, status.json, metrics.csv, samples/, checkpoints/, the averaged weights, and the
files of its loggers, such as tensorboard/.
"""

import logging
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from cascade.batch import image_size
from cascade.config.checks import accumulation
from cascade.config.compose import built, saved
from cascade.data.loading import Samples, loader
from cascade.encoders.weights import weights_hash
from cascade.errors import UserError
from cascade.files.atomic import check_writable
from cascade.files.lease import Lease, lease
from cascade.files.process import is_first_rank
from cascade.runs.done import DONE, finished
from cascade.runs.resumable import check_resumable
from cascade.runs.run import Position, Run
from cascade.stage import Stage
from cascade.trainable import Trainable
from cascade.training.callbacks.ema import EMA, Measure
from cascade.training.callbacks.grids import SampleGrids
from cascade.training.callbacks.guard import Guard, Rollback, resume_from
from cascade.training.callbacks.history import History
from cascade.training.callbacks.interruption import Interruption, stoppable
from cascade.training.callbacks.logging import Logging
from cascade.training.callbacks.saving import Checkpoints
from cascade.training.callbacks.seeding import Seeding
from cascade.training.callbacks.skips import Skips
from cascade.training.callbacks.watchdog import Watchdog
from cascade.training.checkpoint import CheckpointFolders, newest_checkpoint
from cascade.training.devices import check_processes, plugins
from cascade.training.distill import teach
from cascade.training.inputs import TrainingData, first_batches, grid_samples, training_samples
from cascade.training.loggers.logger import Logger, check_installed
from cascade.training.loggers.tensorboard import TensorBoard
from cascade.training.module import Training
from cascade.training.preservation import preserve
from cascade.training.provenance import Provenance
from cascade.training.threads import apart

FURTHER_LOSSES = ("alignment", "perceptual", "adversarial")  # groups in conf/


def train(config: DictConfig) -> Path:
    """Train the module that `config` describes, or resume it. Returns the run directory.

    Raises:
        UserError: bad input of any kind, or another process is training in the run directory.
        Superseded: another process has taken the run directory over.
    """
    folder = Path(config.run)
    check_processes(config.trainer)
    if min(config.batch, config.images) < 1:
        raise UserError(f"batch={config.batch} images={config.images}: both must be at least 1")
    check_resumable(config, Run(folder))
    if finished(folder, config.images):
        print(f"{config.name}: finished before ({folder})")
        return folder
    check_installed(_loggers(config))
    check_writable(folder, "choose another run=...")
    with stoppable(folder), lease(folder) if is_first_rank() else nullcontext() as held:
        while True:
            try:
                return _attempt(config, held)
            except Rollback as spike:
                rank_zero_only(print)(f"{config.name}: {spike}")


def _attempt(config: DictConfig, held: Lease | None) -> Path:
    """Train to the end or to a rollback. `held` is the run's lease, on the first rank."""
    folder = Path(config.run)
    if held:
        (folder / DONE).unlink(missing_ok=True)
    _silence_lightning()

    torch.manual_seed(config.seed)  # of the initial weights; later draws have their own seeds
    module = built(config.stage)
    checkpoint = newest_checkpoint(folder)
    samples = training_samples(config, module, checkpoint)
    begun = _begin(config, module, samples, fresh=not checkpoint)
    attach(config, module)
    rank_zero_only(saved)(config, Run(folder).config_file)

    step, consumed = (checkpoint.step, checkpoint.consumed) if checkpoint else (0, 0)
    consumed = max(consumed, resume_from(folder))
    start = Position(step, config.batch, offset=consumed - step * config.batch)

    provenance = Provenance(module, samples, begun)
    watchdog = Watchdog(folder, config.watchdog)
    callbacks = _callbacks(config, held, module, samples, start, provenance)
    # First: once a step is done, the others' work counts as between steps, with a longer limit.
    trainer = _trainer(config, [watchdog, *callbacks])
    share, trainer.accumulate_grad_batches = accumulation(
        config.batch, config.micro_batch, trainer.world_size
    )
    data = TrainingData(samples, share, start.consumed, config.workers)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    module.to(memory_format=torch.channels_last)
    watchdog.start(trainer.global_rank)
    try:
        with nullcontext() if torch.cuda.is_available() else apart():
            trainer.fit(
                Training(module),
                data,
                ckpt_path=checkpoint and str(checkpoint.path),
                weights_only=True,
            )
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None
    finally:  # an error may precede what Lightning tells callbacks
        watchdog.stop()
    return folder


def _begin(config: DictConfig, module: Trainable, samples: Samples, fresh: bool) -> str | None:
    """Give a module what it begins with, unless a checkpoint will: weights, or statistics of data.

    Returns:
        The hash of the weights of the run that it begins with, if it begins with one.
    """
    start, teacher = config.get("start"), config.get("teacher")
    if teacher:
        teach(module, teacher, begin=fresh and not start)
    if start and (config.get("few") or {}).get("taught"):
        preserve(module, Run(Path(start)))
    if fresh and start:
        module.restore(Path(start), of=f"{config.run}, which was to begin with them")
        return weights_hash(Run(Path(start)).weights)
    if fresh and not teacher and isinstance(module, Stage):
        # `map` is lazy: a codec without statistics, such as that of pixels, reads no data.
        module.codec.fit(map(module.encoded, first_batches(samples, config.fit_images)))
    return None


def attach(config: DictConfig, module: Trainable) -> None:
    """Attach a configuration's adapter and further losses, after the weights to begin with.

    Raises:
        UserError: they do not fit the module.
    """
    if given := config.get("adapter"):
        if not isinstance(module, Stage):
            raise UserError(f"adapter: {config.name} is no generative stage: leave it out")
        module.adapt(built(given))
    for name in FURTHER_LOSSES:
        if given := config.get(name):
            if not hasattr(module, "attach"):
                raise UserError(f"{name}: {config.name} takes no further losses: leave it out")
            module.attach(name, built(given))


def _callbacks(
    config: DictConfig,
    held: Lease | None,
    module: Trainable,
    samples: Samples,
    start: Position,
    provenance: Provenance,
) -> list[L.Callback]:
    """Return the callbacks of a run. Lightning calls them in this order, at each of its hooks."""
    folder, ema = Path(config.run), EMA(config.ema)
    checkpoints = Checkpoints(folder, ema, start, config.images, config.save_seconds)
    callbacks = [
        # Faults for drills, before whatever must cope with them.
        *built(config.get("faults") or {}).values(),
        # Before any other callback restores its state from a checkpoint that does not belong here.
        provenance,
        # Before all that reads gradients: it removes those of a bad step.
        Guard(folder, start, config.spike),
        # Before all that uses the average: measures, grids and checkpoints.
        ema,
    ]
    if config.get("averages"):
        kept = built(config.averages)
        callbacks.append(kept(run=folder, ema=ema, start=start, total=config.images))
    if hasattr(getattr(module, "process", None), "measure"):
        # Before the last checkpoint, which holds what it measures.
        callbacks.append(Measure(ema, loader(samples, math.gcd(64, samples.alike))))
    # Its loggers begin before anything reports to them.
    loggers = Logging(folder, _loggers(config), OmegaConf.to_container(config), start)
    # Nothing depends on the places of these three, as long as checkpoints come after them.
    history = History(folder, config.name, start, config.images, loggers)
    callbacks += [loggers, Seeding(config.seed), history]
    if config.grids and image_size(getattr(module, "writes", "")):
        marks = [config.images * (i + 1) // config.grids for i in range(config.grids)]
        batch, label = grid_samples(config, samples)
        callbacks.append(SampleGrids(folder, ema, start, batch, label, marks, loggers))
    return [
        *callbacks,
        # After the metrics and grids of a step at which it may end the run, before checkpoints.
        Skips(folder, samples.max_skip_fraction, checkpoints.save),
        # Saves on a signal or when a checkpoint is due, and may end the run.
        Interruption(folder, checkpoints, held),
        # Last: a checkpoint is written once all other output of its step is.
        checkpoints,
    ]


def _loggers(config: DictConfig) -> dict[str, Logger]:
    """Return the loggers by name. Runs of earlier versions name none, and use TensorBoard."""
    if "logger" not in config:
        return {"tensorboard": TensorBoard()}
    return built(config.logger)


def _trainer(config: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        max_steps=-(-config.images // config.batch),
        max_epochs=-1,
        gradient_clip_val=config.gradient_clip,
        callbacks=callbacks,
        plugins=[CheckpointFolders(), *plugins()],
        # The callbacks do all of this.
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **built(config.trainer),
    )


def _silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
