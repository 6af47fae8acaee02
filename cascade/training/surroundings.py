"""What a run depends on beside its configuration: its shards and its frozen encoders.

A run that goes on with others would not be the run that it was: another order of samples, other
conditions.
"""

from typing import Any

import lightning as L

from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.encoders.identity import differs
from cascade.errors import UserError


class Surroundings(L.Callback):
    """Writes into each checkpoint what its run was trained with, and refuses to go on with another.

    Args:
        module: its frozen encoders, if it has any, are told by their hashes.
        shards: by their fingerprint; a stream, which has no order, is not compared.
    """

    def __init__(self, module: L.LightningModule, shards: Shards | Stream):
        self.encoders = {e.name: e for e in getattr(module, "encoders", ())}
        self.hashes = {name: encoder.hash for name, encoder in self.encoders.items()}
        self.shards = shards.corpus.fingerprint if isinstance(shards, Shards) else None

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        checkpoint["surroundings"] = {"encoders": dict(self.hashes), "shards": self.shards}

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
        for name, noted in then["encoders"].items():
            if name in self.encoders and (why := differs(self.encoders[name], noted)):
                raise UserError(
                    f"{name} is another encoder than when this run began ({why}): put the old one "
                    "back, or choose another run=..."
                )
