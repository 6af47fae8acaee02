"""The variational bound of a stage on held-out pictures, in bits per dimension."""

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.batch import Batch, image_size
from cascade.diffusion.distillation import Distilled
from cascade.diffusion.gaussian import Process
from cascade.diffusion.likelihood import bound
from cascade.draws import Draws
from cascade.latents.codec import Latent
from cascade.pipeline import Cascade
from cascade.stage import Stage

BATCH = 64  # pictures at a time


@torch.no_grad()
def bits_per_dimension(stage: Stage, batch: Batch, seed: int, steps: int) -> Float[Tensor, " b"]:
    """The bound on -log2 p(x0 | condition) of each picture, per dimension (DDPM, equation 5).

    Args:
        stage: writes pictures, by a diffusion.
        batch: holds `sample`, the true pictures, and all keys that the stage reads.
        steps: of the ancestral sampler whose likelihood is bounded; each is a call of the network.
    """

    def draws(purpose: str) -> Draws:
        return Draws(seed, f"{stage.writes}/bound/{purpose}", batch["sample"], stage.device)

    x0 = stage.codec.encode(batch)
    if stage.corruption:
        batch = stage.corruption(batch, draws("corruption"), training=False)
    cond = stage.conditioner(stage.encoded(batch))
    net = stage.noisy(batch, lambda: draws("augmentation"))
    return bound(stage.process, net, x0, cond, draws("noise"), steps).total


def bounds(
    cascade: Cascade, captions: list[str], truth: Batch, seed: int, steps: int
) -> dict[str, float]:
    """The mean bound of each stage that writes pictures, given what earlier stages should write.

    Distilled stages have none, since they know few noise levels, and neither do latent ones, since
    a bound on latents is none on pictures.
    """
    found = {}
    for stage in cascade.stages:
        process = getattr(stage, "process", None)
        if not (image_size(stage.writes) and isinstance(process, Process)):
            continue
        if isinstance(process, Distilled) or isinstance(stage.codec, Latent):
            continue
        bits = []
        for start in range(0, len(captions), BATCH):
            rows = slice(start, start + BATCH)
            part = {key: value[rows].to(stage.device) for key, value in truth.items()}
            part |= {"caption": captions[rows], "sample": range(len(captions))[rows]}
            bits.append(bits_per_dimension(stage, part, seed, steps))
        found[stage.writes] = torch.cat(bits).double().mean().item()
    return found
