"""The bipartite latent of a picture (unCLIP, section 3): its CLIP embedding, and x_T.

x_T is the noise from which DDIM, conditioned on the embedding, leads to the picture. Both ways pass
the same levels, without thresholding.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cascade.batch import Batch
from cascade.diffusion.distillation import Distilled
from cascade.diffusion.noise import cosine
from cascade.diffusion.solvers import ddim, ddim_inversion
from cascade.diffusion.spacing import karras
from cascade.errors import UserError
from cascade.stage import Stage


def levels(steps: int) -> Float64[Tensor, " n"]:
    """The levels [steps + 1], nearly even in logsnr, where iterations converge fast.

    At the cleanest one, sigma / alpha = 0.02, a picture counts as its own noisy version. At even
    cleaner levels the network's error, which is divided by sigma, exceeds the noise that a picture
    could have, and x_T would not look like noise.
    """
    return karras(cosine, steps + 1, sigma_min=0.02)[:-1]


@torch.no_grad()
def inverted(
    stage: Stage, batch: Batch, steps: int = 50, refine: int = 0, captioned: bool = False
) -> Float[Tensor, "b *d"]:
    """The x_T of the pictures that a stage would write, without guidance.

    Args:
        batch: the pictures, and the keys that the stage reads.
        steps: of DDIM.
        refine: iterations per step (`ddim_inversion`).
        captioned: whether the stage is told the caption.

    Raises:
        UserError: the stage was distilled, and knows the levels of a few steps alone.
    """
    if isinstance(stage.process, Distilled):
        raise UserError("its decoder was distilled, and cannot be inverted: name its teacher's run")
    asked = stage.asked(batch, 0, without=dropped(captioned))

    def denoise(x: Tensor, logsnr: Tensor):
        return stage.process.denoise(asked.net, x, logsnr, asked.cond)

    return ddim_inversion(denoise, stage.codec.encode(batch), levels(steps), refine)


@torch.no_grad()
def decoded(
    stage: Stage,
    batch: Batch,
    seed: int,
    steps: int = 50,
    eta: float = 0.0,
    scale: float = 1.0,
    captioned: bool = False,
) -> Tensor:
    """The pictures that DDIM makes of `x_T`.

    Args:
        batch: `x_T`, and the keys that the stage reads.
        eta: 0 is deterministic, and inverts `inverted`; larger values vary the picture.
        scale: of guidance.
    """
    stage = stage.altered(sampler=replace(stage.sampler, scale=scale, threshold=None))
    net, _, cond, weaker, noise = stage.asked(batch, seed, without=dropped(captioned))
    denoise = stage.sampler.denoiser(stage.process, net, cond, weaker)
    return stage.codec.decode(ddim(denoise, batch["x_T"], levels(steps), noise, eta))


def dropped(captioned: bool) -> tuple[str, ...]:
    """The sources that a stage is not told."""
    return () if captioned else ("caption",)
