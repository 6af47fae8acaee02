"""The provenance of a run: the shards and frozen encoders that it is trained with.

Resuming with others would change the run: another order of samples, other conditions. Both are
identified by content, so their files may be moved and renamed.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cascade.data.loading import Samples
from cascade.data.tars.splits import ALL
from cascade.encoders.identity import differs
from cascade.errors import UserError
from cascade.trainable import Trainable
from cascade.training.checkpoint import STATE, Checkpoint, newest_checkpoint

KEY = "surroundings"  # in checkpoints


class Provenance(L.Callback):
    """Records in each checkpoint what its run is trained with, and refuses to resume with others.

    Args:
        module: its frozen encoders, and those that its losses read, are recorded by their hashes.
        samples: recorded by content or fingerprint, and by the encoders of their embeddings.
        start: the hash of another run's weights that a new run begins with; None: it begins with
            none, or from a checkpoint, which recorded it.
    """

    def __init__(self, module: Trainable, samples: Samples, start: str | None = None):
        self.start = start
        teachers = [t for one in module.further.values() if (t := getattr(one, "teacher", None))]
        frozen = [*module.frozen, *teachers]
        named = {encoder.name: encoder for encoder in frozen}
        self.encoders = list(named.values())  # one of each name, which is the key in checkpoints
        self.hashes = {encoder.name: encoder.hash for encoder in self.encoders}
        self.samples = samples.provenance()
        self.embeddings = [about.hash for s in samples.embeddings if (about := s.about)]

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        own = {"encoders": dict(self.hashes), "embeddings": list(self.embeddings)}
        begun = {"start": self.start} if self.start else {}
        checkpoint[KEY] = {**own, **begun, **self.samples}

    def on_load_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        """Raise UserError if the shards or encoders differ from those of the checkpoint."""
        then = checkpoint.get(KEY)
        if then is None:  # written by a version that did not record them
            return
        self.start = then.get("start")
        if not _same(then, self.samples):
            raise UserError(
                "the shards differ from those that this run began with (tars were added, removed "
                "or changed), and so does their order: restore them, or choose another run=..."
            )
        if then.get("embeddings", self.embeddings) != self.embeddings:
            raise UserError(
                "the embeddings or captions were made by other weights than those that this run "
                "began with: restore the old ones, or choose another run=..."
            )
        # Paired by order, because an encoder that was moved has another name.
        for encoder, hash in zip(self.encoders, then["encoders"].values()):
            if why := differs(encoder, hash):
                raise UserError(
                    f"{encoder.name} differs from the encoder that this run began with ({why}): "
                    "restore the old one, or choose another run=..."
                )


def recorded(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Return the provenance recorded in a checkpoint; None if there is none."""
    if checkpoint is None:
        return None
    file = checkpoint.path / STATE
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state.get(KEY)


def as_begun(checkpoint: Checkpoint | None, build: Callable[..., Samples]) -> Samples:
    """Build the training samples; for a resumed run, those that it began with.

    A run keeps its samples and their order, even if its tars have got a split by name since, or an
    index that holds some of their pictures out.

    Args:
        build: builds them, with the given options overridden.

    Raises:
        UserError: they cannot be built.
    """
    then = recorded(checkpoint)
    if then is not None and then["shards"] is not None:
        for options in ({}, {"hold_out": then.get("held_out", 0.0)}, {"split": ALL}):
            with suppress(UserError):
                if _same(then, (samples := build(**options)).provenance()):
                    return samples
    return build()  # if those of a resumed run differ, `Provenance` will refuse them


def trained_on(run: Path, build: Callable[..., Samples], share: float) -> bool:
    """Return whether a run is known to have trained on pictures that an index now holds out.

    Args:
        build: builds the samples that it may have been trained on.
        share: the fraction of pictures that is held out now.
    """
    then = recorded(newest_checkpoint(run))
    if then is None or (had := then.get("held_out", 0.0)) >= share:
        return False
    return _same(then, build(hold_out=had).provenance())


def _same(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compare contents if both are known; otherwise (older runs, no index) names and sizes."""
    by = "content" if then.get("content") and now["content"] else "shards"
    return then[by] == now[by]
