"""A training without data or memory: its configuration, and a module that can be rehearsed."""

from collections.abc import Callable

import numpy as np
import torch
from omegaconf import DictConfig

from cascade.batch import FRAMING, Batch
from cascade.config.compose import built, composed
from cascade.errors import UserError
from cascade.latents.autoencoder import Posterior
from cascade.latents.codec import Latent
from cascade.nets.cost import Rehearsal
from cascade.trainable import Trainable


def rehearsed(overrides: list[str]) -> tuple[DictConfig, Rehearsal]:
    """Composes a stage, and tries its forward pass.

    Raises:
        UserError: a batch is not a whole number above 0, or the network does not fit the stage.
    """
    config = composed("train", ["data.path=none", *overrides])
    return config, rehearsal_of(config)


def rehearsal_of(config: DictConfig) -> Rehearsal:
    """Tries the forward pass of a resolved configuration. Raises UserError as `rehearsed`."""
    for key, value in (("batch", config.batch), ("micro_batch", config.micro_batch or 1)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key}={value}: choose a whole number above 0")
    with torch.device("meta"):
        module = built(config.stage)
    for part in (getattr(module, "process", None), getattr(module, "corruption", None)):
        if schedule := getattr(part, "schedule", None):
            schedule(torch.tensor([0.5]))  # caches its table as numbers, not as fake tensors
    if isinstance(codec := getattr(module, "codec", None), Latent):
        codec.autoencoder = _Blank(codec)  # frozen, as text encoders, which are not counted
    rehearsal = Rehearsal(module, batches(config, module))
    try:
        _ = rehearsal.forward
    except Exception as error:  # any of torch's functions may find shapes that do not fit
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"net does not fit stage {config.name}: {reason}") from error
    return rehearsal


class _Blank:
    """An autoencoder without files, which gives latents of zeros."""

    def __init__(self, codec: Latent):
        self.shape = codec.shape({})

    def to(self, device: torch.device) -> "_Blank":
        return self

    def posterior(self, x: torch.Tensor) -> Posterior:
        return Posterior(x.new_zeros(len(x), *self.shape))


def batches(config: DictConfig, module: Trainable) -> Callable[[int], Batch]:
    """Returns a function that creates batches with every key that a stage may read.

    Pictures are cropped as in training, and captions have their greatest length.
    """
    pictures, clip = built(config.data.pictures), built(config.clip.model)
    blank = np.zeros((pictures.largest, pictures.largest, 3), np.uint8)
    views = pictures.views(blank, np.random.default_rng(0)) if pictures.sizes else {}
    # Not getattr: the length of a frozen CLIP is a property that would load it.
    lengths = [vars(encoder).get("length") for encoder in getattr(module, "encoders", ())]
    length = next((n for n in lengths if n), clip.length)

    def rows(count: int) -> Batch:
        return {
            "sample": range(count),
            "caption": [""] * count,
            "tokens": torch.zeros(count, length, dtype=torch.int64),
            "label": torch.zeros(count, dtype=torch.int64),
            "text": torch.zeros(count, length, config.text.size),
            "text_mask": torch.ones(count, length, dtype=torch.bool),
            "clip_text": torch.zeros(count, clip.dim),
            "clip_image": torch.zeros(count, clip.dim),
            **{key: torch.zeros(count, 2) for key in FRAMING},
            **{key: torch.zeros(count, *view.shape) for key, view in views.items()},
        }

    return lambda count: {**rows(count), "empty": rows(1)}
