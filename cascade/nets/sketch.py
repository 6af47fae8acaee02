"""A coarse picture predicted from the caption alone, which conditions a small decoder."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.conditioning import Mask
from cascade.errors import UserError
from cascade.nets.attention import TransformerBlock, number_of_heads
from cascade.nets.layers import Positions


class Sketch(nn.Module):
    """Predicts the mean picture [b, channels, size, size] given a condition's tokens.

    Each position of a coarse grid, embedded by its coordinates, attends to the tokens, like the
    output queries of Perceiver IO (2107.14795, section 3). A stage trains it to predict x0, at
    every noise level of the sample, and concatenates it to x_t. It learns which object a caption
    places where within some 8,000 scenes. Attention inside a U-Net did not within 30,000: its
    queries are noisy pictures, and few samples are noisy enough to require the caption.

    Args:
        width: width of the tokens and of all layers.
        size: side of the picture, in pixels.
        patch: side of a grid position, in pixels.
        head_channels: channels per attention head.
        layers: number of attention layers.
        channels: channels of x0.

    Raises:
        UserError: `size` is not a multiple of `patch`, or `width` not of `head_channels`.
    """

    def __init__(
        self,
        width: int,
        size: int,
        patch: int,
        head_channels: int,
        layers: int = 2,
        channels: int = 3,
    ):
        super().__init__()
        if size % patch:
            raise UserError(f"a side of {size} px is not a multiple of patch={patch}: change one")
        self.patch, self.side, self.channels = patch, size // patch, channels
        self.places = Positions(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            TransformerBlock(width, number_of_heads(width, head_channels)) for _ in range(layers)
        )
        self.out = nn.Linear(width, channels * patch**2)

    def forward(self, tokens: Float[Tensor, "b n w"], mask: Mask) -> Float[Tensor, "b c size size"]:
        x = self.places(self.side, self.side).flatten(1).T.expand(len(tokens), -1, -1)
        tokens = self.norm_tokens(tokens)
        for layer in self.layers:
            x = layer(x, mask[:, None, None], tokens)
        x = self.out(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(x, self.patch)
