"""What the autoencoders of latent stages lose: true pictures, encoded and decoded again."""

import torch

from cascade.eval.cascades.protocol import HeldOut, Metrics, by_kind, verdicts
from cascade.eval.metrics.interval import of_mean
from cascade.latents.autoencoder import psnr
from cascade.latents.codec import Latent
from cascade.pipeline import Cascade, innermost


@torch.inference_mode()
def reconstruction(cascade: Cascade, data: HeldOut) -> Metrics:
    """By key of the pictures: PSNR in dB, and scene accuracy of the reconstructions.

    Args:
        data: with the true pictures of all stages.

    Returns:
        Nothing of stages that diffuse no latents.
    """
    found: Metrics = {}
    for link in cascade.stages:
        stage = innermost(link)
        if not isinstance(codec := getattr(stage, "codec", None), Latent):
            continue
        true = data.truth[link.writes]
        parts = (part.to(stage.device) for part in true.split(64))
        made = torch.cat([codec.decode(codec.encode({link.writes: x})).cpu() for x in parts])
        ratios = psnr(true, made)
        found[link.writes] = {
            "psnr": ratios.mean().item(),
            "interval": of_mean(ratios),
            "count": len(made),
            **by_kind(verdicts(made, data), data),
        }
    return found
