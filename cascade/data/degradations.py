"""Corrupts the low-resolution input of a super-resolution stage: blur, and noise augmentation.

The picture is corrupted once per sample, in training and in sampling, before the conditioner reads
it: both branches of guidance and all steps see the same. BSR (`cascade.data.bsr`), which changes
the size, runs in the data workers instead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cascade.batch import Batch, image_key
from cascade.diffusion.noise import Noise, Schedule, alpha_sigma, cosine_table
from cascade.errors import UserError


def even_logsnr(level: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """logsnr = 10 - 10 level: no visible noise at 0, as much noise as signal at 1."""
    return 10 - 10 * level


def indexed_cosine(level: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """DeepFloyd-IF's schedule: index int(1000 level), at most 999, of iDDPM's 1000 cosine steps.

    So even level 0 adds some noise, that of index 0.
    """
    # The 1e-4 keeps multiples of 1 / 1000, which float32 may round down, at their own index.
    index = (1000 * level.double() + 1e-4).floor().clamp(max=999)
    return cosine_table((index + 0.5) / 1000).to(level.dtype)


def blur(
    x: Float[Tensor, "b c h w"], sigma: float | Float[Tensor, " b"], kernel: int = 3
) -> Float[Tensor, "b c h w"]:
    """Gaussian blur with mirrored borders; `sigma`, in pixels, may differ between samples."""
    b, c, h, w = x.shape
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(b)
    offsets = torch.arange(kernel, dtype=x.dtype, device=x.device) - kernel // 2
    taps = torch.softmax(-(offsets**2) / (2 * sigma[:, None] ** 2), 1).repeat_interleave(c, 0)
    x = F.pad(x, (kernel // 2,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, b c, h, w]
    x = F.conv2d(x, taps[:, None, :, None], groups=b * c)
    return F.conv2d(x, taps[:, None, None, :], groups=b * c).view(b, c, h, w)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur, in training only.

    SR3 and unCLIP (appendix C) always blur with sigma 0.6; cascaded diffusion models (2106.15282)
    blur half of the samples, with a sigma drawn from a range.

    Args:
        least, most: sigma is uniform between them, in pixels of the low-resolution picture.
        share: fraction of samples that are blurred.
        kernel: side of the kernel in pixels, odd.
    """

    least: float = 0.6
    most: float = 0.6
    share: float = 1.0
    kernel: int = 3

    def __call__(
        self, x: Float[Tensor, "b c h w"], u: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Blur each sample as its uniform draw u in [0, 1] decides: whether, and how much."""
        sigma = self.least + (self.most - self.least) * u / self.share  # uniform given u <= share
        chosen = (u <= self.share)[:, None, None, None]
        return torch.where(chosen, blur(x, sigma, self.kernel), x)


@dataclass(frozen=True)
class Corruption:
    """Blur, then variance-preserving Gaussian noise of a level that the network is told.

    The level s in [0, 1] maps to a logsnr (noise conditioning augmentation: Imagen, section 2.5;
    the corrupted z_s of cascaded diffusion models). In training it is uniform in [0, `most`]; in
    sampling it is `level`, which may be chosen after training.

    Args:
        low: side of the low-resolution picture; the network reads the level, scaled to 0 to 10, as
            `image_{low}_level` [b].
        most: the greatest level in training.
        level: the level in sampling.
        schedule: maps the level to logsnr; None adds no noise.
        blur: in training.

    Raises:
        UserError: a level in sampling that does not occur in training.
    """

    low: int
    most: float = 0.5
    level: float = 0.0
    schedule: Schedule | None = even_logsnr
    blur: Blur | None = None

    def __post_init__(self):
        most = self.most if self.schedule else 0
        if not 0 <= self.level <= most:
            raise UserError(
                f"level={self.level} for {image_key(self.low)}: this stage was trained for 0 to "
                f"{most}"
            )

    def __call__(self, batch: Batch, noise: Noise, training: bool) -> Batch:
        key = image_key(self.low)
        x = batch[key]
        level = torch.full((len(x),), self.level, dtype=x.dtype, device=x.device)
        if training:
            u, v = torch.special.ndtr(noise((len(x), 2))).unbind(1)
            level = self.most * u if self.schedule else level
            x = self.blur(x, v) if self.blur else x
        if self.schedule:
            alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(self.schedule(level)))
            x = alpha * x + sigma * noise(tuple(x.shape))
        return {**batch, key: x, f"{key}_level": 10 * level}
