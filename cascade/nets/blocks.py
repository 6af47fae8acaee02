"""The blocks of a U-Net: residual, with attention, or only resampling."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.nets import layers

Norm = Callable[[int], layers.GroupNorm]


class Resample(nn.Module):
    """DDPM's resampling: a convolution with stride 2, or one after enlargement.

    Args:
        channels: number of input and output channels.
        resample: 0.5 or 2.
    """

    def __init__(self, channels: int, resample: float):
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resample < 1 else 1, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None, cond: Cond) -> Tensor:
        return layers.convolve_enlarged(self.conv, x) if self.resample > 1 else self.conv(x)


class Block(nn.Module):
    """A residual block (BigGAN's, which can resample inside), and attention after it.

    Args:
        channels_in, channels: number of input and output channels.
        embed: size of the noise-level embedding; None: the block reads none.
        dropout: rate before the second convolution.
        resample: factor of the resolution: 0.5, 1 or 2.
        attention, cross: layers over the positions, one after the other, each with a residual.
        norm: creates a normalisation.
        shift_only: add the embedding before the second normalisation (DDPM), instead of scaling and
            shifting its result (ADM).
        project: use a convolution in the shortcut even if the channels agree.
        activation: after each normalisation; None: SiLU.
        scale: factor of the sum of the shortcut and the residual (IF, stage II: 0.7071).
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        embed: int | None,
        dropout: float = 0.0,
        resample: float = 1.0,
        attention: nn.Module | None = None,
        cross: nn.Module | None = None,
        norm: Norm = layers.GroupNorm,
        shift_only: bool = False,
        project: bool = False,
        activation: nn.Module | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.channels, self.resample, self.shift_only = channels, resample, shift_only
        self.activation, self.scale = activation, scale
        self.norm_in = norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        outputs = channels if shift_only else 2 * channels
        self.modulation = nn.Linear(embed, outputs) if embed else None
        self.norm_out = norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = layers.zero(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels and not project
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)
        self.attention = attention
        self.norm_attention = norm(channels) if attention else None
        self.cross = cross
        self.norm_cross = norm(channels) if cross else None

    def forward(self, x: Tensor, emb: Tensor | None, cond: Cond) -> Tensor:
        h = self.norm_in.activated(x, activation=self.activation)
        modulation = self.modulation(emb) if self.modulation else None
        if self.resample > 1:
            h, x = layers.convolve_enlarged(self.conv_in, h), F.interpolate(x, scale_factor=2)
        elif self.resample < 1:
            h, x = self.conv_in(F.avg_pool2d(h, 2)), F.avg_pool2d(x, 2)
        else:
            h = self.conv_in(h)
        # In place, here and below: no backward pass needs the output of a convolution.
        if self.shift_only and modulation is not None:
            h += modulation[:, :, None, None]
            modulation = None
        h = self.norm_out.activated(h, modulation, self.activation)
        h = self.conv_out(self.dropout(h))
        h += self.skip(x)
        if self.scale != 1:
            h = h * self.scale
        for norm, layer in ((self.norm_attention, self.attention), (self.norm_cross, self.cross)):
            if layer is not None:
                sequence = norm(h).flatten(2).transpose(1, 2)
                y = layer(sequence, cond.tokens, cond.mask)
                h = h + y.transpose(1, 2).unflatten(2, h.shape[2:])
        return h
