"""A plain transformer on patches of pixels ("just image transformers", JiT, 2511.13720).

Patches are embedded through a bottleneck, far narrower than the pixels they hold, and the network
is made for x0-prediction: clean pictures lie near a low-dimensional manifold, which noise does not
(section 3). Blocks have RMS norms, rotary positions, normalised queries and keys, and SwiGLU, and
are scaled, shifted and gated by the noise level (adaLN-zero). The condition comes through the ports
of every network: the vector is added to the noise level, tokens are attended to beside the patches,
and the picture is concatenated to x.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.errors import UserError
from cascade.nets import layers
from cascade.nets.attention import attended, number_of_heads, split_heads, unmasked
from cascade.nets.unet import check_sides


def angles(
    height: int, width: int, channels: int, device: torch.device
) -> Float[Tensor, "n {channels}"]:
    """The angles of rotary positions (2104.09864) in two directions, for each pair of channels.

    Half of the pairs turn with the row, half with the column, at frequencies from 1 down to 1e-4;
    channel i belongs together with channel i + channels / 2, so each angle is listed twice.
    """
    quarter = channels // 4
    frequencies = 1e4 ** (-torch.arange(quarter, device=device) / quarter)
    sides = [torch.arange(n, device=device)[:, None] * frequencies for n in (height, width)]
    rows = sides[0][:, None].expand(-1, width, -1)
    columns = sides[1][None].expand(height, -1, -1)
    half = torch.cat([rows, columns], 2).flatten(0, 1)
    return torch.cat([half, half], 1)


def turned(x: Float[Tensor, "b h n c"], by: Float[Tensor, "n c"]) -> Float[Tensor, "b h n c"]:
    """Rotates pairs of channels (i, i + c / 2) by angles."""
    first, second = x.chunk(2, 3)
    return x * by.cos().to(x) + torch.cat([-second, first], 3) * by.sin().to(x)


class JiTBlock(nn.Module):
    """Attention and SwiGLU, each with a scale, a shift and a gate that the noise level gives.

    Args:
        channels: width of the sequence.
        head_channels: channels per attention head; a multiple of 4.
        embed: size of the noise-level embedding.
        width: width of the condition's tokens; None: they are not attended to.
    """

    def __init__(self, channels: int, head_channels: int, embed: int, width: int | None):
        super().__init__()
        self.channels, self.heads = channels, number_of_heads(channels, head_channels)
        self.modulation = layers.zero(nn.Linear(embed, 6 * channels))
        self.norm_attention, self.norm_mlp = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.kv = nn.Linear(width, 2 * channels) if width else None
        self.norm_q, self.norm_k = nn.RMSNorm(head_channels), nn.RMSNorm(head_channels)
        self.out = nn.Linear(channels, channels)
        inner = 8 * channels // 3  # as many parameters as an MLP four times as wide
        self.gate_up = nn.Linear(channels, 2 * inner)
        self.down = nn.Linear(inner, channels)

    def forward(
        self, x: Float[Tensor, "b n c"], emb: Float[Tensor, "b e"], turn: Tensor, cond: Cond
    ) -> Float[Tensor, "b n c"]:
        scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = (
            part[:, None] for part in self.modulation(emb).chunk(6, 1)
        )
        x = x + gate * self._attention(self.norm_attention(x) * (1 + scale) + shift, turn, cond)
        h, up = self.gate_up(self.norm_mlp(x) * (1 + scale_mlp) + shift_mlp).chunk(2, 2)
        return x + gate_mlp * self.down(F.silu(h) * up)

    def _attention(self, x: Tensor, turn: Tensor, cond: Cond) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        q, k = turned(self.norm_q(q), turn), turned(self.norm_k(k), turn)
        mask = None
        if self.kv is not None and cond.tokens is not None:
            more_k, more_v = split_heads(self.kv(cond.tokens), 2, self.heads)
            k, v = torch.cat([k, self.norm_k(more_k)], 2), torch.cat([v, more_v], 2)
            mask = F.pad(cond.mask, (x.shape[1], 0), value=unmasked(cond.mask))[:, None, None]
        return self.out(attended(q, k, v, mask).transpose(1, 2).flatten(2))


class JiT(nn.Module):
    """F(x, logsnr, cond) for pictures x, of the shape of x.

    Args:
        channels: width of the sequence of patches.
        depth: number of blocks.
        embed: size of the noise-level embedding and of `cond.vector`.
        patch: side of a patch, in pixels.
        head_channels: channels per attention head.
        bottleneck: width of the patch embedding's first layer.
        width: width of `cond.tokens`; None: the network reads no tokens.
        image_channels: channels of `cond.image`.
        pixels: channels of x.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.

    Raises:
        UserError: the heads do not divide the width, or their channels are no multiple of 4.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        embed: int,
        patch: int,
        head_channels: int = 64,
        bottleneck: int = 128,
        width: int | None = None,
        image_channels: int = 0,
        pixels: int = 3,
        checkpoint: bool = False,
    ):
        super().__init__()
        if head_channels % 4:
            raise UserError(
                f"net.head_channels={head_channels} is no multiple of 4, which positions in two "
                "directions need: change it"
            )
        self.embed, self.width, self.image_channels = embed, width, image_channels
        self.patch, self.divisor, self.checkpoint = patch, patch, checkpoint
        self.pixels = pixels
        self.head_channels = head_channels
        self.noise_level = layers.NoiseLevel(embed)
        given = (pixels + image_channels) * patch**2
        self.embed_in = nn.Sequential(
            nn.Linear(given, bottleneck, bias=False), nn.Linear(bottleneck, channels)
        )
        self.positions = layers.Positions(channels)
        self.blocks = nn.ModuleList(
            JiTBlock(channels, head_channels, embed, width) for _ in range(depth)
        )
        self.norm_out = nn.RMSNorm(channels)
        self.modulation_out = layers.zero(nn.Linear(embed, 2 * channels))
        self.embed_out = layers.zero(nn.Linear(channels, pixels * patch**2))

    def forward(
        self, x: Float[Tensor, "b c h w"], logsnr: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c h w"]:
        check_sides(self, *x.shape[2:])
        emb = self.noise_level(logsnr)
        emb = F.silu(emb if cond.vector is None else emb + cond.vector)
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = F.pixel_unshuffle(h, self.patch)
        grid = h.shape[2:]
        h = self.embed_in(h.flatten(2).mT) + self.positions(*grid).flatten(1).T
        turn = angles(*grid, self.head_channels, x.device)
        for block in self.blocks:
            h = layers.run(self, block, h, emb, turn, cond)
        scale, shift = self.modulation_out(emb)[:, None].chunk(2, 2)
        h = self.embed_out(self.norm_out(h) * (1 + scale) + shift)
        return F.pixel_shuffle(h.mT.unflatten(2, grid), self.patch)
