"""The U-Net of ADM and GLIDE.

Residual blocks whose second normalisation is scaled and shifted by the noise-level embedding, up-
and downsampling inside residual blocks, attention at the coarser levels with the condition's
tokens joined in. With attention it is also told places, which a caption may speak of; without, it
is fully convolutional: trained on crops, applied to whole pictures. `patch` folds p x p pixels
into channels first, which saves work at high resolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.nets.layers import Attention, GroupNorm, NoiseLevel, Positions, zero


class Block(nn.Module):
    """Residual block (BigGAN's, with up- or downsampling inside), then attention if asked for."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        embed: int,
        dropout: float = 0.0,
        resample: float = 1.0,
        attention: nn.Module | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm_in = GroupNorm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embed, 2 * channels)
        self.norm_out = GroupNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)
        self.attention = attention
        self.norm_attention = GroupNorm(channels) if attention else None

    def forward(self, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        h = self._resample(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, 1)
        h = self.norm_out(self.conv_in(h)) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        x = self.skip(self._resample(x)) + h
        if self.attention is None:
            return x
        sequence = self.norm_attention(x).flatten(2).transpose(1, 2)
        y = self.attention(sequence, cond.tokens, cond.mask)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample < 1:
            return F.avg_pool2d(x, round(1 / self.resample))
        return F.interpolate(x, scale_factor=self.resample) if self.resample > 1 else x


class UNet(nn.Module):
    """F(x, logsnr, cond), of the shape of x.

    Args:
        channels: at the finest level.
        multipliers: of `channels`, a level each.
        blocks: residual blocks per level (one more on the way up).
        embed: size of the noise-level embedding, which is also that of `cond.vector`.
        attention: the levels with attention, 0 the finest (64 px with 1, 2, 3: 32, 16 and 8 px).
        head_channels: channels per attention head.
        width: width of `cond.tokens`; None for a network that reads none.
        image_channels: channels of `cond.image`.
        patch: pixels (p x p) folded into channels at the input and unfolded at the output.
        dropout: in each residual block.
        pixels: channels of x.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        embed: int,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        width: int | None = None,
        image_channels: int = 0,
        patch: int = 1,
        dropout: float = 0.0,
        pixels: int = 3,
    ):
        super().__init__()
        self.patch, self.divisor = patch, patch * 2 ** (len(multipliers) - 1)
        self.noise_level = NoiseLevel(embed)

        def block(
            c_in: int, c: int, level: int, resample: float = 1.0, attend: bool = True
        ) -> Block:
            attend = attend and level in attention
            attention_ = Attention(c, min(head_channels, c), width) if attend else None
            return Block(c_in, c, embed, dropout, resample, attention_)

        levels = [channels * m for m in multipliers]
        self.positions = Positions(levels[0]) if attention else None
        self.conv_in = nn.Conv2d((pixels + image_channels) * patch**2, levels[0], 3, padding=1)
        self.down, skips, c = nn.ModuleList(), [levels[0]], levels[0]
        for level, c_level in enumerate(levels):
            if level > 0:
                self.down.append(block(c, c, level, resample=0.5, attend=False))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, c_level, level))
                c = c_level
                skips.append(c)
        last = len(levels) - 1
        self.middle = nn.ModuleList([block(c, c, last), block(c, c, last, attend=False)])
        self.up = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), c_level, level))
                c = c_level
            if level > 0:
                self.up.append(block(c, c, level, resample=2.0, attend=False))
        self.norm_out = GroupNorm(c)
        self.conv_out = zero(nn.Conv2d(c, pixels * patch**2, 3, padding=1))

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(f"sides {tuple(x.shape[2:])} are not multiples of {self.divisor}")
        emb = self.noise_level(logsnr)
        emb = F.silu(emb if cond.vector is None else emb + cond.vector)
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = self.conv_in(F.pixel_unshuffle(h, self.patch))
        if self.positions:
            h = h + self.positions(*h.shape[2:])
        skips = [h]
        for block in self.down:
            h = block(h, emb, cond)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb, cond)
        for block in self.up:
            h = block(h if block.resample > 1 else torch.cat([h, skips.pop()], 1), emb, cond)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class Residual(nn.Module):
    """A network that predicts what its condition's picture lacks: F = net(...) + cond.image.

    For super-resolution with x0-prediction: at the start of training the output is the bicubic
    enlargement, so that the network learns detail alone.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        return self.net(x, logsnr, cond) + cond.image
