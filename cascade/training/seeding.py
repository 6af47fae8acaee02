"""What torch itself draws in training (dropout) follows from the seed, the rank and the batch.

So a run has no random state to save, and one that goes on draws what it would have drawn. With
another number of ranks it goes on as well: a new rank draws what it would have from the beginning.
"""

import lightning as L
import torch

from cascade.draws import generator


class Seeding(L.Callback):
    """Seeds torch anew for each batch of each rank, on all devices.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        stream = generator(self.seed, f"torch/{trainer.global_rank}", batch_idx)
        torch.manual_seed(int(stream.integers(2**63)))
