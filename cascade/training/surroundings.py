"""What a run depends on beside its configuration: its shards and its frozen encoders.

A run that goes on with others would not be the run that it was: another order of samples, other
conditions.
"""

from typing import Any

import lightning as L

from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.errors import UserError


class Surroundings(L.Callback):
    """Writes into each checkpoint what its run was trained with, and refuses to go on with another.

    Args:
        module: its frozen encoders, if it has any, are told by the hash of their weights.
        shards: by their fingerprint; a stream, which has no order, is not compared.
    """

    def __init__(self, module: L.LightningModule, shards: Shards | Stream):
        self.encoders = {e.name: e.hash for e in getattr(module, "encoders", ())}
        self.shards = shards.corpus.fingerprint if isinstance(shards, Shards) else None

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        checkpoint["surroundings"] = {"encoders": dict(self.encoders), "shards": self.shards}

    def on_load_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where shards or encoders are others than those of the checkpoint."""
        then = checkpoint.get("surroundings")
        if then is None:  # of a version that did not note them
            return
        if then["shards"] != self.shards:
            raise UserError(
                "the shards are others than when this run began (tars were added, removed or "
                "changed), and so is their order: put them back, or choose another run=..."
            )
        for name, before in then["encoders"].items():
            if self.encoders.get(name, before) != before:
                raise UserError(
                    f"{name} has other weights than when this run began: put the old ones back, "
                    "or choose another run=..."
                )
