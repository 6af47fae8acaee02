"""Makes torch's own draws in training (dropout) a function of seed, rank and batch number.

So there is no random state to save, a resumed run draws what the uninterrupted one would have,
and a run can resume with another number of ranks.
"""

import lightning as L
import torch

from cascade.draws import generator


class Seeding(L.Callback):
    """Seeds torch, on all devices, before each batch of each rank.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        stream = generator(self.seed, f"torch/{trainer.global_rank}", batch_idx)
        torch.manual_seed(int(stream.integers(2**63)))
