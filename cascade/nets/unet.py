"""The U-Net of DDPM, ADM, GLIDE, unCLIP and Imagen.

The noise-level embedding scales and shifts the second normalisation of each residual block. Blocks
resample inside, and attend to the picture and the condition's tokens at the coarser levels. With
attention the network also reads positions, which captions may refer to; without, it is fully
convolutional, so it trains on crops and applies to whole pictures. `patch` folds p x p pixels into
channels first, which saves computation at high resolution. All activations are channels-last: that
is fastest for convolutions, and is a sequence of positions without a copy.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets import layers
from cascade.nets.attention import Attention, CrossAttention
from cascade.nets.layers import Timestep

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

    def forward(self, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        return layers.convolve_enlarged(self.conv, x) if self.resample > 1 else self.conv(x)


class Block(nn.Module):
    """A residual block (BigGAN's, which can resample inside), and attention after it.

    Args:
        channels_in, channels: number of input and output channels.
        embed: size of the noise-level embedding.
        dropout: rate before the second convolution.
        resample: factor of the resolution: 0.5, 1 or 2.
        attention, cross: layers over the positions, one after the other, each with a residual.
        norm: creates a normalisation.
        shift_only: add the embedding before the second normalisation (DDPM), instead of scaling and
            shifting its result (ADM).
        project: use a convolution in the shortcut even if the channels agree.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        embed: int,
        dropout: float = 0.0,
        resample: float = 1.0,
        attention: nn.Module | None = None,
        cross: nn.Module | None = None,
        norm: Norm = layers.GroupNorm,
        shift_only: bool = False,
        project: bool = False,
    ):
        super().__init__()
        self.resample, self.shift_only = resample, shift_only
        self.norm_in = norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embed, channels if shift_only else 2 * channels)
        self.norm_out = norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = layers.zero(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels and not project
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)
        self.attention = attention
        self.norm_attention = norm(channels) if attention else None
        self.cross = cross
        self.norm_cross = norm(channels) if cross else None

    def forward(self, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        h, modulation = self.norm_in.activated(x), self.modulation(emb)
        if self.resample > 1:
            h, x = layers.convolve_enlarged(self.conv_in, h), F.interpolate(x, scale_factor=2)
        elif self.resample < 1:
            h, x = self.conv_in(F.avg_pool2d(h, 2)), F.avg_pool2d(x, 2)
        else:
            h = self.conv_in(h)
        # In place, here and below: no backward pass needs the output of a convolution.
        if self.shift_only:
            h += modulation[:, :, None, None]
        h = self.norm_out.activated(h, None if self.shift_only else modulation)
        h = self.conv_out(self.dropout(h))
        h += self.skip(x)
        for norm, layer in ((self.norm_attention, self.attention), (self.norm_cross, self.cross)):
            if layer is not None:
                sequence = norm(h).flatten(2).transpose(1, 2)
                y = layer(sequence, cond.tokens, cond.mask)
                h = h + y.transpose(1, 2).unflatten(2, h.shape[2:])
        return h


class UNet(nn.Module):
    """F(x, logsnr, cond), of the shape of x, or of twice its channels with a learned variance.

    Args:
        channels: number of channels at the finest level.
        multipliers: factors of `channels`, one per level.
        blocks: residual blocks per level (one more in the decoder), or a number for each level.
        embed: size of the noise-level embedding and of `cond.vector`.
        attention: levels with attention, 0 the finest (64 px with 1, 2, 3: 32, 16 and 8 px).
        head_channels: channels per attention head.
        width: width of `cond.tokens`; None: the network reads no tokens.
        image_channels: channels of `cond.image`.
        patch: side of the patches of pixels folded into channels.
        dropout: rate in each residual block.
        pixels: channels of x.
        learned_variance: double the channels of F; the second half is iDDPM's variance.
        positions: whether a network with attention reads positions (published ones do not).
        cross: attend to the tokens in a layer of its own, after self-attention.
        strided: resample in convolutions between blocks (DDPM), not inside blocks.
        shift_only: blocks add the embedding (DDPM), instead of scaling and shifting by it.
        skip_scale: factor of the skip connections (1 / sqrt(2): SR3, Imagen).
        norm: creates a normalisation for a number of channels.
        level: features of the noise level; None: Fourier features of logsnr itself.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: int | Sequence[int],
        embed: int,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        width: int | None = None,
        image_channels: int = 0,
        patch: int = 1,
        dropout: float = 0.0,
        pixels: int = 3,
        learned_variance: bool = False,
        positions: bool = True,
        cross: bool = False,
        strided: bool = False,
        shift_only: bool = False,
        skip_scale: float = 1.0,
        norm: Norm = layers.GroupNorm,
        level: Timestep | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        numbers = numbers_of_blocks(blocks, multipliers, attention)
        self.embed, self.width, self.image_channels = embed, width, image_channels
        self.patch, self.divisor = patch, patch * 2 ** (len(multipliers) - 1)
        self.skip_scale, self.checkpoint = skip_scale, checkpoint
        self.noise_level = layers.NoiseLevel(embed, level)

        styled = partial(Block, embed=embed, dropout=dropout, norm=norm, shift_only=shift_only)

        def block(c_in: int, c: int, i: int, attend: bool = True) -> Block:
            if not attend or i not in attention:
                return styled(c_in, c)
            heads = min(head_channels, c)
            other = CrossAttention(c, heads, width) if cross and width else None
            own = Attention(c, heads, None if cross else width)
            return styled(c_in, c, attention=own, cross=other)

        def resample(c: int, factor: float) -> nn.Module:
            return Resample(c, factor) if strided else styled(c, c, resample=factor)

        levels = [channels * m for m in multipliers]
        self.positions = layers.Positions(levels[0]) if attention and positions else None
        self.conv_in = nn.Conv2d((pixels + image_channels) * patch**2, levels[0], 3, padding=1)
        self.down, skips, c = nn.ModuleList(), [levels[0]], levels[0]
        for i, c_level in enumerate(levels):
            if i > 0:
                self.down.append(resample(c, 0.5))
                skips.append(c)
            for _ in range(numbers[i]):
                self.down.append(block(c, c_level, i))
                c = c_level
                skips.append(c)
        last = len(levels) - 1
        self.middle = nn.ModuleList([block(c, c, last), block(c, c, last, attend=False)])
        self.up = nn.ModuleList()
        for i, c_level in reversed(list(enumerate(levels))):
            for _ in range(numbers[i] + 1):
                self.up.append(block(c + skips.pop(), c_level, i))
                c = c_level
            if i > 0:
                self.up.append(resample(c, 2.0))
        self.norm_out = norm(c)
        outputs = pixels * (2 if learned_variance else 1)
        self.conv_out = layers.zero(nn.Conv2d(c, outputs * patch**2, 3, padding=1))

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b d h w"]:
        check_sides(self, *x.shape[2:])
        emb = self.noise_level(logsnr)
        emb = F.silu(emb if cond.vector is None else emb + cond.vector)
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = F.pixel_unshuffle(h, self.patch).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)
        if self.positions:
            h = h + self.positions(*h.shape[2:])
        skips = [h]
        for block in self.down:
            h = layers.run(self, block, h, emb, cond)
            skips.append(h)
        for block in self.middle:
            h = layers.run(self, block, h, emb, cond)
        for block in self.up:
            if block.resample == 1:
                h = joined(h, skips.pop(), self.skip_scale)
            h = layers.run(self, block, h, emb, cond)
        return F.pixel_shuffle(self.conv_out(self.norm_out.activated(h)), self.patch)


def joined(x: Tensor, skip: Tensor, scale: float) -> Tensor:
    """Concatenates x and a scaled skip connection."""
    return torch.cat([x, skip if scale == 1 else scale * skip], 1)


def check_sides(net: nn.Module, *sides: int) -> None:
    """Refuses pictures whose sides the network cannot halve as often as it has to.

    Raises:
        UserError: a side is not a multiple of `net.divisor`.
    """
    if wrong := [side for side in sides if side % net.divisor]:
        raise UserError(
            f"sides of {wrong[0]} px are not multiples of {net.divisor}, as the network requires: "
            "change size or crop, or net.multipliers or net.patch"
        )


def numbers_of_blocks(
    blocks: int | Sequence[int], multipliers: Sequence[int], attention: Sequence[int]
) -> list[int]:
    """The number of residual blocks at each level.

    Raises:
        UserError: `blocks` has another number of levels, or `attention` names a missing level.
    """
    levels = len(multipliers)
    numbers = [blocks] * levels if isinstance(blocks, int) else list(blocks)
    if len(numbers) != levels or min(numbers, default=0) < 1:
        raise UserError(
            f"net.blocks={numbers} for the {levels} levels of net.multipliers: "
            "give one number, or one of at least 1 for each level"
        )
    if wrong := sorted(set(attention) - set(range(levels))):
        raise UserError(
            f"net.attention={wrong}, but net.multipliers has {levels} levels: give numbers from 0 "
            f"to {levels - 1}"
        )
    return numbers


class Residual(nn.Module):
    """Adds the condition's picture to a network's output: F = net(...) + cond.image.

    For super-resolution with x0-prediction: training starts from the bicubic enlargement, so the
    network only has to learn the missing detail.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.divisor, self.image_channels = net.divisor, net.image_channels
        self.embed, self.width = net.embed, net.width

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        return self.net(x, logsnr, cond) + cond.image
