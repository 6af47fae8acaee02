"""The U-Net of DDPM, ADM, GLIDE, unCLIP and Imagen.

Residual blocks whose second normalisation is scaled and shifted by the noise-level embedding, up-
and downsampling inside residual blocks, attention at the coarser levels with the condition's
tokens joined in. With attention it is also told places, which a caption may speak of; without, it
is fully convolutional: trained on crops, applied to whole pictures. `patch` folds p x p pixels
into channels first, which saves work at high resolution. All within is channels-last, which is
what convolutions are fastest on, and a sequence of places without a copy.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets.layers import (
    Attention,
    CrossAttention,
    GroupNorm,
    NoiseLevel,
    Positions,
    Timestep,
    convolve_enlarged,
    run,
    zero,
)

Norm = Callable[[int], GroupNorm]


class Resample(nn.Module):
    """DDPM's change of resolution: a convolution with stride 2, or one after enlargement.

    Args:
        channels: in and out.
        resample: 0.5 or 2.
    """

    def __init__(self, channels: int, resample: float):
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resample < 1 else 1, padding=1)

    def forward(self, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        return convolve_enlarged(self.conv, x) if self.resample > 1 else self.conv(x)


class Block(nn.Module):
    """Residual block (BigGAN's, with up- or downsampling inside), then attention if asked for.

    Args:
        channels_in, channels: of what comes and of what goes.
        embed: size of the noise-level embedding.
        dropout: before the second convolution.
        resample: 0.5: half the resolution, 2: twice.
        attention, cross: over the places, one after the other, each with its own residual.
        norm: makes a normalisation.
        shift_only: the embedding is added before the second normalisation (DDPM), rather than
            scaling and shifting its result (ADM).
        project: a convolution in the shortcut even where the channels agree.
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
        norm: Norm = GroupNorm,
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
        self.conv_out = zero(nn.Conv2d(channels, channels, 3, padding=1))
        same = channels_in == channels and not project
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)
        self.attention = attention
        self.norm_attention = norm(channels) if attention else None
        self.cross = cross
        self.norm_cross = norm(channels) if cross else None

    def forward(self, x: Tensor, emb: Tensor, cond: Cond) -> Tensor:
        h, modulation = self.norm_in.activated(x), self.modulation(emb)
        if self.resample > 1:
            h, x = convolve_enlarged(self.conv_in, h), F.interpolate(x, scale_factor=2)
        elif self.resample < 1:
            h, x = self.conv_in(F.avg_pool2d(h, 2)), F.avg_pool2d(x, 2)
        else:
            h = self.conv_in(h)
        # In place, here and below: nobody keeps what a convolution gave.
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
    """F(x, logsnr, cond), of the shape of x; with a learned variance, of twice its channels.

    Args:
        channels: at the finest level.
        multipliers: of `channels`, a level each.
        blocks: residual blocks per level (one more on the way up), or a number for each.
        embed: size of the noise-level embedding, which is also that of `cond.vector`.
        attention: the levels with attention, 0 the finest (64 px with 1, 2, 3: 32, 16 and 8 px).
        head_channels: channels per attention head.
        width: width of `cond.tokens`; None for a network that reads none.
        image_channels: channels of `cond.image`.
        patch: pixels (p x p) folded into channels at the input and unfolded at the output.
        dropout: in each residual block.
        pixels: channels of x.
        learned_variance: twice as many channels of F; the second half is of the variance (iDDPM).
        positions: whether a network with attention is told places (published ones are not).
        cross: the tokens have an attention layer of their own, after self-attention.
        strided: resolution changes in convolutions between the blocks (DDPM), not inside blocks.
        shift_only: blocks add the embedding (DDPM); otherwise it scales and shifts.
        skip_scale: factor of what is joined from the way down (1 / sqrt(2): SR3, Imagen).
        norm: makes a normalisation for so many channels.
        level: features of the noise level; None: those of logsnr itself.
        checkpoint: keep the inputs of blocks only, and compute them again in backward.

    Raises:
        UserError: numbers that do not fit together.
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
        norm: Norm = GroupNorm,
        level: Timestep | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        numbers = numbers_of_blocks(blocks, multipliers, attention)
        self.embed, self.width, self.image_channels = embed, width, image_channels
        self.patch, self.divisor = patch, patch * 2 ** (len(multipliers) - 1)
        self.skip_scale, self.checkpoint = skip_scale, checkpoint
        self.noise_level = NoiseLevel(embed, level)

        styled = partial(Block, embed=embed, dropout=dropout, norm=norm, shift_only=shift_only)

        def block(c_in: int, c: int, i: int, attend: bool = True) -> Block:
            if not attend or i not in attention:
                return styled(c_in, c)
            heads = min(head_channels, c)
            own = CrossAttention(c, heads, width) if cross and width else None
            return styled(
                c_in, c, attention=Attention(c, heads, None if cross else width), cross=own
            )

        def resample(c: int, factor: float) -> nn.Module:
            return Resample(c, factor) if strided else styled(c, c, resample=factor)

        levels = [channels * m for m in multipliers]
        self.positions = Positions(levels[0]) if attention and positions else None
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
        self.conv_out = zero(nn.Conv2d(c, outputs * patch**2, 3, padding=1))

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
            h = run(self, block, h, emb, cond)
            skips.append(h)
        for block in self.middle:
            h = run(self, block, h, emb, cond)
        for block in self.up:
            if block.resample == 1:
                h = joined(h, skips.pop(), self.skip_scale)
            h = run(self, block, h, emb, cond)
        return F.pixel_shuffle(self.conv_out(self.norm_out.activated(h)), self.patch)


def joined(x: Tensor, skip: Tensor, scale: float) -> Tensor:
    """The channels of x and those from the way down, scaled."""
    return torch.cat([x, skip if scale == 1 else scale * skip], 1)


def check_sides(net: nn.Module, *sides: int) -> None:
    """Refuses pictures that the network cannot halve as often as it does.

    Raises:
        UserError: a side is not a multiple of `net.divisor`.
    """
    if wrong := [side for side in sides if side % net.divisor]:
        raise UserError(
            f"sides of {wrong[0]} px are not multiples of {net.divisor}, by which the network "
            "divides them: change size or crop, or net.multipliers or net.patch"
        )


def numbers_of_blocks(
    blocks: int | Sequence[int], multipliers: Sequence[int], attention: Sequence[int]
) -> list[int]:
    """Residual blocks of each level.

    Raises:
        UserError: there is another number of levels in `blocks`, or no such level in `attention`.
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
            f"net.attention={wrong} of net.multipliers' {levels} levels: they count from 0 to "
            f"{levels - 1}"
        )
    return numbers


class Residual(nn.Module):
    """A network that predicts what its condition's picture lacks: F = net(...) + cond.image.

    For super-resolution with x0-prediction: at the start of training the output is the bicubic
    enlargement, so that the network learns detail alone.
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
