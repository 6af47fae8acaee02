"""What a run depends on beside its configuration: its shards and its frozen encoders.

A run that goes on with others would not be the run that it was: another order of samples, other
conditions. Both are known by their content: where they lie, and what they are called, may change.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cascade.data.shards import Shards
from cascade.data.splits import ALL
from cascade.data.stream import Stream
from cascade.encoders.identity import differs
from cascade.errors import UserError
from cascade.training.checkpoint import STATE, Checkpoint, newest_checkpoint


class Surroundings(L.Callback):
    """Writes into each checkpoint what its run was trained with, and refuses to go on with another.

    Args:
        module: its frozen encoders, if it has any, are told by their hashes.
        shards: by their content, or fingerprint, and by whose embeddings they are joined with; a
            stream, which has no order, by the latter alone.
    """

    def __init__(self, module: L.LightningModule, shards: Shards | Stream):
        named = {encoder.name: encoder for encoder in getattr(module, "encoders", ())}
        self.encoders = list(named.values())  # one of each name, as they are written down
        self.hashes = {encoder.name: encoder.hash for encoder in self.encoders}
        self.shards = _of(shards)
        self.embeddings = [about.hash for s in shards.embeddings if (about := s.about)]

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        own = {"encoders": dict(self.hashes), "embeddings": list(self.embeddings)}
        checkpoint["surroundings"] = {**own, **self.shards}

    def on_load_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where shards or encoders are others than those of the checkpoint."""
        then = checkpoint.get("surroundings")
        if then is None:  # of a version that did not note them
            return
        if not _same(then, self.shards):
            raise UserError(
                "the shards are others than when this run began (tars were added, removed or "
                "changed), and so is their order: put them back, or choose another run=..."
            )
        if then.get("embeddings", self.embeddings) != self.embeddings:
            raise UserError(
                "the embeddings are of other weights than when this run began: put the old ones "
                "back, or choose another run=..."
            )
        # In their order, as their folders may have moved.
        for encoder, noted in zip(self.encoders, then["encoders"].values()):
            if why := differs(encoder, noted):
                raise UserError(
                    f"{encoder.name} is another encoder than when this run began ({why}): put the "
                    "old one back, or choose another run=..."
                )


def recorded(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """What a run was trained with until this checkpoint; None: nothing says it."""
    if checkpoint is None:
        return None
    file = checkpoint.path / STATE
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state.get("surroundings")


def as_begun(
    checkpoint: Checkpoint | None, shards: Callable[..., Shards | Stream]
) -> Shards | Stream:
    """The shards that a run began with; where it begins, those that there are.

    A run that was begun before its tars had a split, or an index held anything out of them, keeps
    the order that it had, and so what is held out since.

    Args:
        shards: makes them, with other arguments where some are given.

    Raises:
        UserError: they cannot be made.
    """
    then = recorded(checkpoint)
    if then is None or then["shards"] is None:
        return shards()
    try:
        today: Shards | Stream | UserError = shards()
    except UserError as error:
        today = error
    if not isinstance(today, UserError) and _same(then, _of(today)):
        return today
    for options in ({"hold_out": then.get("held_out", 0.0)}, {"split": ALL}):
        with suppress(UserError):
            if _same(then, _of(before := shards(**options))):
                return before
    if isinstance(today, UserError):
        raise today
    return today  # whatever they are: the checkpoint will refuse them


def trained_on(run: Path, shards: Callable[..., Shards], share: float) -> bool:
    """Whether a run is known to be trained with some of what so large a share holds out.

    Args:
        shards: makes those that it may have been trained on.
    """
    then = recorded(newest_checkpoint(run))
    if then is None or (had := then.get("held_out", 0.0)) >= share:
        return False
    return _same(then, _of(shards(hold_out=had)))


def _of(shards: Shards | Stream) -> dict[str, Any]:
    if not isinstance(shards, Shards):
        return {"shards": None, "content": None, "held_out": 0.0}
    corpus = shards.corpus
    return {"shards": corpus.fingerprint, "content": corpus.identity, "held_out": corpus.share}


def _same(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """By content, where it is known of both; of older runs, or without an index, by name."""
    by = "content" if then.get("content") and now["content"] else "shards"
    return then[by] == now[by]
