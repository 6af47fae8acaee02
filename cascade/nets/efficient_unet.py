"""Imagen's Efficient U-Net, for super-resolution (2205.11487, appendix B).

Most parameters are at low resolution. Each level halves the resolution before its convolutions and
doubles it after them; skip connections are scaled by 1 / sqrt(2). Without self-attention it is
fully convolutional, so it trains on crops and applies to whole pictures.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets.attention import Attention, CrossAttention
from cascade.nets.layers import NoiseLevel, convolve_enlarged, run, zero
from cascade.nets.unet import Block, check_sides, joined, numbers_of_blocks, steered


class EfficientUNet(nn.Module):
    """F(x, logsnr, cond), of the shape of x; cond.image is the enlarged low-resolution picture.

    The noise-level embedding plus `cond.vector` scales and shifts in every block. Attention to the
    text follows the last block of a level, and is twice as wide as the level, as in the paper.

    Args:
        channels: number of channels of the first convolution and of the finest level.
        multipliers: factors of `channels`, one per level; the first has half the resolution of x.
        blocks: residual blocks of each level, the same number in encoder and decoder.
        embed: size of the noise-level embedding and of `cond.vector`.
        attention: levels that read the text, 0 the finest.
        width: width of `cond.tokens`.
        self_attention: attend to the picture as well as the text (64 to 256 px); otherwise to the
            text alone (256 to 1024 px).
        heads: number of attention heads.
        image_channels: channels of `cond.image`.
        pixels: channels of x.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

    Attributes:
        joins: channels of each skip connection, and of the middle.

    Raises:
        UserError: sizes that do not fit together.
    """

    WAY_UP = ("up", "unstride", "conv_out")

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: Sequence[int],
        embed: int,
        attention: Sequence[int],
        width: int,
        self_attention: bool = False,
        heads: int = 8,
        image_channels: int = 3,
        pixels: int = 3,
        checkpoint: bool = False,
    ):
        super().__init__()
        numbers = numbers_of_blocks(blocks, multipliers, attention)
        self.embed, self.width, self.image_channels = embed, width, image_channels
        self.divisor, self.checkpoint = 2 ** len(multipliers), checkpoint
        levels = [channels * m for m in multipliers]
        if wrong := [c for i, c in enumerate(levels) if i in attention and c % heads]:
            raise UserError(
                f"net.heads={heads} do not divide {wrong[0]} channels: change it, "
                "net.channels or net.multipliers"
            )
        kind = Attention if self_attention else CrossAttention

        def level(i: int, c: int, c_in: int) -> nn.ModuleList:
            attend = [i in attention and k == numbers[i] - 1 for k in range(numbers[i])]
            attentions = [kind(c, 2 * c // heads, width, 2 * c) if yes else None for yes in attend]
            sizes = [c_in] + [c] * (numbers[i] - 1)
            return nn.ModuleList(
                Block(c_k, c, embed, attention=a, project=True) for c_k, a in zip(sizes, attentions)
            )

        self.noise_level = NoiseLevel(embed)
        self.conv_in = nn.Conv2d(pixels + image_channels, channels, 3, padding=1)
        self.patch, self.joins = 1, (*levels, levels[-1])
        finer = [channels, *levels[:-1]]
        self.stride = nn.ModuleList(
            nn.Conv2d(f, c, 3, stride=2, padding=1) for f, c in zip(finer, levels)
        )
        self.down = nn.ModuleList(level(i, c, c) for i, c in enumerate(levels))
        self.up = nn.ModuleList(level(i, c, 2 * c) for i, c in enumerate(levels))
        self.unstride = nn.ModuleList(nn.Conv2d(c, f, 3, padding=1) for f, c in zip(finer, levels))
        self.conv_out = zero(nn.Conv2d(channels, pixels, 1))

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        emb, *skips, h = steered(self.encoded(x, logsnr, cond), cond)
        for unstride, blocks in zip(reversed(self.unstride), reversed(self.up)):
            h = joined(h, skips.pop(), 2**-0.5)
            for block in blocks:
                h = run(self, block, h, emb, cond)
            h = convolve_enlarged(unstride, h)
        return self.conv_out(h)

    def encoded(
        self,
        x: Float[Tensor, "b c h w"],
        logsnr: Float[Tensor, " b"],
        cond: Cond,
        hint: Float[Tensor, "b c0 h w"] | None = None,
    ) -> list[Tensor]:
        """The way down, as that of a `UNet`; the last level's output is its middle."""
        check_sides(self, *x.shape[2:])
        emb = self.noise_level(logsnr)
        emb = F.silu(emb if cond.vector is None else emb + cond.vector)
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        if hint is not None:
            h = h + hint
        done = [emb]
        for stride, blocks in zip(self.stride, self.down):
            h = stride(h)
            for block in blocks:
                h = run(self, block, h, emb, cond)
            done.append(h)
        return [*done, h]
