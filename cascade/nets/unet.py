"""The U-Net of DDPM, ADM, GLIDE, unCLIP and Imagen.

The noise-level embedding scales and shifts the second normalisation of each residual block. Blocks
resample inside, and attend to the picture and the condition's tokens at the coarser levels. With
attention the network also reads positions, which captions may refer to; without, it is fully
convolutional, so it trains on crops and applies to whole pictures. `patch` folds p x p pixels into
channels first, which saves computation at high resolution. All activations are channels-last: that
is fastest for convolutions, and is a sequence of positions without a copy.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets import layers
from cascade.nets.attention import Attention, CrossAttention
from cascade.nets.blocks import Block, Norm, Resample
from cascade.nets.layers import Timestep


class UNet(nn.Module):
    """F(x, logsnr, cond), of the shape of x, or of twice its channels with a learned variance.

    Args:
        channels: number of channels at the finest level.
        multipliers: factors of `channels`, one per level.
        blocks: residual blocks per level (one more in the decoder), or a number for each level.
        embed: size of the noise-level embedding and of `cond.vector`.
        attention: levels with attention, 0 the finest (64 px with 1, 2, 3: 32, 16 and 8 px).
        head_channels: channels per attention head.
        heads: number of attention heads at every level, in place of `head_channels`.
        width: width of `cond.tokens`; None: the network reads no tokens.
        image_channels: channels of `cond.image`.
        patch: side of the patches of pixels folded into channels.
        dropout: rate in each residual block.
        pixels: channels of x.
        learned_variance: double the channels of F; the second half is iDDPM's variance.
        positions: whether a network with attention reads positions (published ones do not).
        cross: attend to the tokens in a layer of its own, after self-attention.
        text_alone: attend to the tokens alone, without self-attention (IF, stage II).
        token_groups: number of groups in which each attention normalises the tokens (IF: 32); None:
            it does not.
        strided: resample in convolutions between blocks (DDPM), not inside blocks.
        shift_only: blocks add the embedding (DDPM), instead of scaling and shifting by it.
        skip_scale: factor of the skip connections (1 / sqrt(2): SR3, Imagen).
        block_scale: factor of each residual block's sum (IF, stage II: 0.7071).
        activation: None: SiLU (IF: GELU).
        norm: creates a normalisation for a number of channels.
        level: features of the noise level; None: Fourier features of logsnr itself.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

    Attributes:
        joins: channels of each skip connection, and of the middle.

    Raises:
        UserError: sizes that do not fit together.
    """

    WAY_UP = ("up", "norm_out", "conv_out")

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: int | Sequence[int],
        embed: int,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        heads: int | None = None,
        width: int | None = None,
        image_channels: int = 0,
        patch: int = 1,
        dropout: float = 0.0,
        pixels: int = 3,
        learned_variance: bool = False,
        positions: bool = True,
        cross: bool = False,
        text_alone: bool = False,
        token_groups: int | None = None,
        strided: bool = False,
        shift_only: bool = False,
        skip_scale: float = 1.0,
        block_scale: float = 1.0,
        activation: nn.Module | None = None,
        norm: Norm = layers.GroupNorm,
        level: Timestep | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        numbers = numbers_of_blocks(blocks, multipliers, attention)
        self.embed, self.width, self.image_channels = embed, width, image_channels
        self.patch, self.divisor = patch, patch * 2 ** (len(multipliers) - 1)
        self.pixels = pixels
        self.skip_scale, self.checkpoint = skip_scale, checkpoint
        self.noise_level = layers.NoiseLevel(embed, level, activation)
        self.activation = activation or nn.SiLU()

        styled = partial(
            Block,
            embed=embed,
            dropout=dropout,
            norm=norm,
            shift_only=shift_only,
            activation=activation,
            scale=block_scale,
        )

        def block(c_in: int, c: int, i: int, attend: bool = True) -> Block:
            if not attend or i not in attention:
                return styled(c_in, c)
            per_head = c // heads if heads else min(head_channels, c)
            to_text = None
            if width and (cross or text_alone):
                to_text = CrossAttention(c, per_head, width, token_groups=token_groups)
            if text_alone:
                return styled(c_in, c, attention=to_text)
            own = Attention(c, per_head, None if cross else width, token_groups=token_groups)
            return styled(c_in, c, attention=own, cross=to_text)

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
        self.joins = (*skips, c)
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
        emb, *skips, h = steered(self.encoded(x, logsnr, cond), cond)
        for block in self.up:
            if block.resample == 1:
                h = joined(h, skips.pop(), self.skip_scale)
            h = layers.run(self, block, h, emb, cond)
        h = self.norm_out.activated(h, activation=self.activation)
        return F.pixel_shuffle(self.conv_out(h), self.patch)

    def encoded(
        self,
        x: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, " b"],
        cond: Cond,
        hint: Float[Tensor, "b c0 h0 w0"] | None = None,
    ) -> list[Tensor]:
        """The way down: the blocks' embedding, then the skip connections, and last the middle.

        Args:
            hint: added to the output of the first convolution.
        """
        check_sides(self, *x.shape[2:])
        emb = self.noise_level(logsnr)
        emb = self.activation(emb if cond.vector is None else emb + cond.vector)
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = F.pixel_unshuffle(h, self.patch).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)
        if self.positions:
            h = h + self.positions(*h.shape[2:])
        if hint is not None:
            h = h + hint
        done = [emb, h]
        for block in self.down:
            h = layers.run(self, block, h, emb, cond)
            done.append(h)
        for block in self.middle:
            h = layers.run(self, block, h, emb, cond)
        return [*done, h]


def steered(encoded: list[Tensor], cond: Cond) -> list[Tensor]:
    """What a network's `encoded` returned, with what is `added` to skip connections and middle."""
    if not cond.added:
        return encoded
    emb, *found = encoded
    return [emb, *(h + more for h, more in zip(found, cond.added, strict=True))]


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
