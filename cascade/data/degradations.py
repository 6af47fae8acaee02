"""Corrupts the low-resolution input of a super-resolution stage: blur, and noise augmentation.

The picture is corrupted once per sample, in training and in sampling, before the conditioner reads
it: both branches of guidance and all steps see the same. BSR (`cascade.data.bsr`), which changes
the size, runs in the data workers instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
        late: add the noise to the enlarged picture instead, and anew in each call of the network
            (IF's code); each branch of guidance then sees its own noise.

    Raises:
        UserError: a level in sampling that does not occur in training.
    """

    low: int
    most: float = 0.5
    level: float = 0.0
    schedule: Schedule | None = even_logsnr
    blur: Blur | None = None
    late: bool = False

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
        if self.schedule and not self.late:
            alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(self.schedule(level)))
            x = alpha * x + sigma * noise(tuple(x.shape))
        return {**batch, key: x, f"{key}_level": 10 * level}

    def around(self, net: Any, batch: Batch, draws: Callable[[], Noise]) -> Any:
        """The network, with noise added to its enlarged picture if that is done `late`.

        Args:
            batch: corrupted.
            draws: creates the stream of the noise.
        """
        if not (self.late and self.schedule):
            return net
        return Renoised(net, self.schedule(batch[f"{image_key(self.low)}_level"] / 10), draws())


@dataclass(frozen=True)
class Renoised:
    """A network whose conditioning picture gets fresh noise in each call.

    Args:
        net: F(x, logsnr, cond).
        level: of the noise in the picture, as a logsnr for each of b samples.
        noise: called once for each branch, of which a call may hold several, of b samples each.
    """

    net: Any
    level: Float[Tensor, " b"]
    noise: Noise

    def __call__(
        self, x: Float[Tensor, "n c h w"], logsnr: Float[Tensor, " n"], cond: Any
    ) -> Float[Tensor, "n d h w"]:
        branches = cond.image.split(len(self.level))
        alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(self.level))
        noisy = [alpha * own + sigma * self.noise(tuple(own.shape)).to(own) for own in branches]
        return self.net(x, logsnr, replace(cond, image=torch.cat(noisy)))
