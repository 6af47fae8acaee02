"""How the low-resolution input of a super-resolution stage is corrupted.

In training and in sampling the picture is corrupted once per sample, before the conditioner reads
it: both branches of the guidance and all steps see the same.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cascade.conditioning import Batch
from cascade.diffusion.noise import Noise, alpha_sigma


def blur(x: Float[Tensor, "b c h w"], sigma: float, kernel: int = 3) -> Float[Tensor, "b c h w"]:
    """Gaussian blur with mirrored borders (unCLIP, appendix C: kernel 3, sigma 0.6)."""
    offsets = torch.arange(kernel, dtype=x.dtype, device=x.device) - kernel // 2
    taps = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    c, pad = x.shape[1], kernel // 2
    x = F.pad(x, (pad,) * 4, mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(c, 1, -1, -1), groups=c)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(c, 1, -1, -1), groups=c)


@dataclass(frozen=True)
class Corruption:
    """Blur, then variance-preserving Gaussian noise whose level the network is told.

    The level s in [0, 1] stands for logsnr = 10 - 10 s: no visible noise at 0, as much noise as
    signal at 1 (Imagen, section 2.5: conditioning augmentation). In training it is uniform in
    [0, `most`]; in sampling it is `level`.

    Args:
        low: side of the low-resolution picture; the level becomes `image_{low}_level` [b].
        most: the greatest level in training.
        level: the level in sampling.
        sigma: of the blur in training, in pixels; 0 for none.
        blurred: share of the training samples that are blurred.
    """

    low: int
    most: float = 0.5
    level: float = 0.0
    sigma: float = 0.0
    blurred: float = 0.5

    def __call__(self, batch: Batch, noise: Noise, training: bool) -> Batch:
        key = f"image_{self.low}"
        x = batch[key]
        if training:
            u, v = torch.special.ndtr(noise((len(x), 2))).unbind(1)
            level = self.most * u
            if self.sigma:
                x = torch.where((v < self.blurred)[:, None, None, None], blur(x, self.sigma), x)
        else:
            level = torch.full((len(x),), self.level, device=x.device)
        alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(10 - 10 * level))
        x = alpha * x + sigma * noise(tuple(x.shape))
        return {**batch, key: x, f"{key}_level": 10 * level}
