"""A picture made of a caption alone, which tells a small decoder what is wanted where."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cascade.errors import UserError
from cascade.nets.layers import Positions, TransformerBlock, number_of_heads


class Sketch(nn.Module):
    """The mean picture that a condition's tokens ask for: [b, channels, size, size].

    Each place of a coarse grid, known by its coordinates, attends to the tokens, as the output
    queries of Perceiver IO do (2107.14795, section 3). A stage trains it on x0 itself, whatever
    the noise level of the sample, and concatenates it to x_t. So it learns which object a caption
    wants where in some 8,000 scenes; attention within a U-Net, whose queries are noisy pictures
    and to which few samples are noisy enough to teach it, had not in 30,000.

    Args:
        width: of the tokens, and of all in between.
        size: side of the picture in pixels.
        patch: pixels (p x p) to each place of the grid.
        head_channels: channels per attention head.
        layers: how often the places attend.
        channels: of x0.

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
        self.patch, self.side = patch, size // patch
        self.places = Positions(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            TransformerBlock(width, number_of_heads(width, head_channels)) for _ in range(layers)
        )
        self.out = nn.Linear(width, channels * patch**2)

    def forward(
        self, tokens: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b c size size"]:
        x = self.places(self.side, self.side).flatten(1).T.expand(len(tokens), -1, -1)
        tokens = self.norm_tokens(tokens)
        for layer in self.layers:
            x = layer(x, mask[:, None, None], tokens)
        x = self.out(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(x, self.patch)
