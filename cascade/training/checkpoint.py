"""The format of checkpoints: directories that are complete or absent.

`checkpoints/step-00000123/` holds all that resuming needs: `state.pt`, of plain dictionaries,
tensors, numbers and strings, and `manifest.json`, with the position of the run and the size and
hash of each file. No random state is saved, as all draws are functions of the position
(`cascade.draws`, `cascade.training.callbacks.seeding`).
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
from torch.utils._pytree import tree_leaves

from cascade.errors import UserError
from cascade.files.atomic import REST, remove, write_atomically
from cascade.runs.run import Run

STATE, MANIFEST = "state.pt", "manifest.json"


class Checkpoint(NamedTuple):
    """A complete checkpoint: its directory, optimizer steps, and the number of the next sample."""

    path: Path
    step: int
    consumed: int


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run, hashes verified; None if none was written yet.

    Damaged ones are reported and ignored.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    reason, found = "", Run(run).checkpoints()
    for _, path in reversed(found):
        try:
            about = _verified(path)
        except (OSError, ValueError) as error:
            reason = f"{path.name}: {error}"
            rank_zero_only(print)(f"{run}: ignoring a damaged checkpoint: {reason}")
        else:
            return Checkpoint(path, about["step"], about["consumed"])
    if found:
        raise UserError(
            f"{run} has no intact checkpoint ({reason}): choose another run=..., or "
            f"remove {Run(run).checkpoint_folder} to start over"
        )
    return None


def _verified(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        OSError, ValueError: the checkpoint is damaged; the message says how.
    """
    if not path.is_dir():
        raise ValueError("a single file, the format of older versions")
    try:
        about = json.loads((path / MANIFEST).read_bytes())
        own = about.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if own != _digest(about) or path != Run(path.parents[1]).checkpoint(about["step"]):
        raise ValueError(f"{MANIFEST} has changed")
    for name, expected in about["files"].items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size:,} of {expected['bytes']:,} bytes")
        with open(path / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise ValueError(f"{name} has changed")
    return about


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class _Hashed:
    """A file that hashes what is written to it, and records the first error instead of raising it.

    torch.save would mask the original error with one of its own, about file positions. And it
    writes its end when it is deleted, even after an error (of a dead data worker, say) has closed
    the file: one raised there would end the process by SIGABRT.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.bytes, self.hash = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None and not self.file.closed:
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
    """Writes and reads checkpoint directories for Lightning.

    A failed write is recorded in `failure` instead of raised: the other ranks are waiting for this
    one here, and the caller then ends all of them together.
    """

    failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        path = Path(path)
        try:
            if path.exists():  # written by an earlier attempt that was losing the run's lease
                os.replace(path, rest := path.with_name(f".{path.name}.{time.time_ns()}{REST}"))
                remove(rest)
            write_atomically(path, lambda folder: _write(checkpoint, folder))
        except OSError as error:
            self.failure = error

    def load_checkpoint(self, path, map_location=None, weights_only=True) -> dict[str, Any]:
        # To the CPU: otherwise every rank would load rank 0's tensors onto rank 0's device.
        return torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path) -> None:
        remove(Path(path))


def _write(state: dict[str, Any], folder: Path) -> None:
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    need = sum(tensor.nbytes for tensor in tensors) + 2**20
    free = shutil.disk_usage(folder.parent).free
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


def set_batches_done(checkpoint: dict[str, Any], batches: int) -> None:
    """Set how many batches of this rank Lightning's loop believes to have finished.

    The only place that touches Lightning's private state, which counts micro-batches and resumes
    gradient accumulation and `batch_idx` from that count. A run that resumes with another number of
    ranks accumulates over another number of micro-batches, so the count must follow from the steps.
    `completed` is one less, as in `on_train_batch_end`, where checkpoints are saved.
    """
    counts = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["total"], progress["current"] = dict(counts), dict(counts)
