"""Checkpoints that are whole or not there, and what a finished run leaves behind.

`checkpoints/step-00000123/` is all that resuming needs: `state.pt`, of plain dictionaries, tensors,
numbers and strings, and `manifest.json`, with the position of the run and sizes and hashes. The
position is one number: `consumed`, the samples that all ranks together have consumed. Random state
is none of it, as all draws follow from the position (`cascade.draws`, `cascade.training.seeding`).
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError

from cascade.done import STATUS
from cascade.errors import Failed, Superseded, TryAgain, UserError
from cascade.files import REST, remove, remove_rests, write_atomically
from cascade.training.ema import EMA
from cascade.training.events import event

FOLDER, STATE, MANIFEST = "checkpoints", "state.pt", "manifest.json"


class Checkpoint(NamedTuple):
    """A whole checkpoint: its directory, optimizer steps, and the number of the next sample."""

    path: Path
    step: int
    consumed: int


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, its hashes verified; None if none was written yet.

    It says which ones are damaged, and passes them over.

    Raises:
        UserError: there are checkpoints, but none that is whole.
    """
    reason, found = "", sorted((run / FOLDER).glob("step-*"), reverse=True)
    for path in found:
        try:
            about = _verified(path)
        except (OSError, ValueError) as error:
            reason = f"{path.name}: {error}"
            rank_zero_only(print)(f"{run}: a damaged checkpoint is passed over: {reason}")
        else:
            return Checkpoint(path, about["step"], about["consumed"])
    if found:
        raise UserError(
            f"{run} has no checkpoint that can be read ({reason}): choose another run=..., or "
            f"remove {run / FOLDER} to start over"
        )
    return None


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
        OSError, ValueError: what is wrong with the checkpoint.
    """
    if not path.is_dir():
        raise ValueError("a file, as older versions wrote them")
    try:
        about = json.loads((path / MANIFEST).read_bytes())
        own = about.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if own != _digest(about) or path.name != _name(about["step"]):
        raise ValueError(f"{MANIFEST} has changed")
    for name, expected in about["files"].items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes of {expected['bytes']:,}")
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise ValueError(f"{name} has changed")
    return about


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class _Hashed:
    """A file that hashes what is written to it, and keeps the first error to itself.

    For torch would make another of it, about positions.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.bytes, self.hash = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.hash.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        pass


class CheckpointFolders(CheckpointIO):
    """Writes and reads the directory of a checkpoint.

    A write that the disk refuses is not raised here, where the other ranks wait for this one:
    it is kept in `failure`, for all of them to end together.
    """

    failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        path = Path(path)
        try:
            if path.exists():  # put there by an attempt while it lost the run's lease
                os.replace(path, rest := path.with_name(f".{path.name}.{time.time_ns()}{REST}"))
                remove(rest)
            write_atomically(path, lambda folder: _write(checkpoint, folder))
        except OSError as error:
            self.failure = error

    def load_checkpoint(self, path, map_location=None, weights_only=True) -> dict[str, Any]:
        # To the CPU: otherwise what rank 0 saved is put onto its device by every rank.
        return torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path) -> None:
        remove(Path(path))


def _write(state: dict[str, Any], folder: Path) -> None:
    need, free = _bytes(state) + 2**20, shutil.disk_usage(folder.parent).free
    if need > free:
        sizes = f"{need / 2**20:,.0f} MiB are needed, and {free / 2**20:,.0f} MiB are free"
        raise OSError(errno.ENOSPC, f"{sizes} in {folder.parent}")
    folder.mkdir()
    with open(folder / STATE, "wb") as file:
        hashed = _Hashed(file)
        torch.save(state, hashed)
        if hashed.error:
            raise hashed.error
    versions = {"torch": torch.__version__, "lightning": L.__version__}
    versions["python"] = platform.python_version()
    files = {STATE: {"bytes": hashed.bytes, "sha256": hashed.hash.hexdigest()}}
    about = {**state["position"], "versions": versions, "files": files}
    about["sha256"] = _digest(about)
    (folder / MANIFEST).write_text(json.dumps(about, indent=2) + "\n")


def _bytes(state: Any) -> int:
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes, state))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


class Checkpoints(L.Callback):
    """Saves at the end and when told to; keeps the last two, and exports the average each time.

    It has to be the last of the callbacks: what the others make of a step is then there, or is
    made again behind the checkpoint before. `Interruption` tells it when it is `due`.

    Args:
        run: the run's directory.
        ema: the average, which is exported to the run's directory.
        total: images in all, for `status.json`.
        seconds: behind a checkpoint the next one is due.
        start: the step that this rank goes on from.
        offset: samples that rollbacks have passed over: consumed = images + offset.
    """

    def __init__(
        self,
        run: Path,
        ema: EMA,
        total: int,
        seconds: float = 120,
        start: int = 0,
        offset: int = 0,
    ):
        self.run, self.ema, self.total, self.seconds = run, ema, total, seconds
        self.start, self.offset = start, offset
        self.saved_step = start
        self.saved_at = time.monotonic()

    def setup(self, trainer, module, stage: str) -> None:
        """Network disks may show the newest checkpoint to one machine later than to another."""
        here = torch.tensor(self.start, device=trainer.strategy.root_device)
        if (trainer.strategy.all_gather(here) != here).any():
            raise TryAgain(
                f"{self.run}: ranks see different checkpoints, this one step {self.start}"
            )

    def on_train_start(self, trainer, module) -> None:
        self.saved_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        remove_rests(self.run)
        remove_rests(self.run / FOLDER)
        event(self.run, "resumed" if self.start else "started", **self._position(trainer, module))
        for path in (self.run / FOLDER).glob("step-*"):
            if path.name > _name(self.start):  # damaged, or rolled back
                event(self.run, "set aside", checkpoint=path.name)
                os.replace(path, path.with_name(f".{path.name}{REST}"))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == trainer.max_steps:
            self.save(trainer, module)

    @property
    def due(self) -> bool:
        """Whether it is time to save, by this rank's clock."""
        return time.monotonic() - self.saved_at > self.seconds

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Saves the last step, if it is not saved yet; to be called on all ranks together.

        Raises:
            Failed: on all ranks: it could not be written. The checkpoints before are untouched.
            Superseded: on all ranks: another process has taken over the run.
        """
        if trainer.global_step == self.saved_step:
            return
        began, path = time.monotonic(), self.run / FOLDER / _name(trainer.global_step)
        # The average and the status come first: killed behind the last checkpoint, a run would
        # have no step left that leads here again.
        failure = self._publish(trainer, module)
        trainer.save_checkpoint(path)
        failure = failure or trainer.strategy.checkpoint_io.failure
        if error := trainer.strategy.broadcast(failure and self._error(failure)):
            raise error
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            remove_rests(self.run / FOLDER)
            for old in sorted((self.run / FOLDER).glob("step-*"))[:-2]:
                remove(old)
            seconds = round(self.saved_at - began, 3)
            event(self.run, "checkpoint", **self._position(trainer, module), seconds=seconds)
            if trainer.global_step * module.batch >= self.total:
                event(self.run, "finished", images=trainer.global_step * module.batch)

    def _publish(self, trainer, module) -> Exception | None:
        status = {"images": trainer.global_step * module.batch, "total": self.total}
        try:
            with self.ema.applied(module):
                module.export(self.run)
            if trainer.is_global_zero:
                text = json.dumps(status) + "\n"
                write_atomically(self.run / STATUS, lambda path: path.write_text(text))
        except (OSError, SafetensorError) as error:
            return error
        return None

    def _error(self, failure: Exception) -> Failed | Superseded:
        if isinstance(failure, Superseded):
            return failure
        last = newest_checkpoint(self.run)
        kept = f"{last.path} is whole" if last else "there is no other"
        what = f"a checkpoint failed ({failure})"
        return Failed(f"{self.run}: {what}; {kept}: make room and start again")

    def _position(self, trainer, module) -> dict[str, int]:
        step = trainer.global_step
        images = step * module.batch
        consumed = images + self.offset
        position = {"step": step, "images": images, "consumed": consumed, "offset": self.offset}
        return {**position, "ranks": trainer.world_size}

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = self._position(trainer, module)
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])  # ordered ones are no plain ones

    def on_load_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        # As many batches are behind the run as its steps take now: with other ranks it may
        # accumulate over another number of them. The last one is not completed before it is saved.
        done = checkpoint["position"]["step"] * trainer.accumulate_grad_batches
        counts = {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["total"], progress["current"] = dict(counts), dict(counts)
