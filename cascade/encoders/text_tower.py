"""CLIP's text tower as open_clip builds it, without open_clip, whose import takes seconds.

A cascade reads captions only, and needs neither open_clip's other towers nor the weights of the
CLIP's own picture tower.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cascade.encoders.weights import some_of

# The options of `text_cfg` that `TextTower` follows; with others, open_clip builds another tower.
OPTIONS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}

_OTHERS = ("visual.", "logit_")  # of a CLIP


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: type[nn.Module]):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """CLIP's causal text transformer; parameters are named as in open_clip's `CLIP`.

    Args:
        dim: d, the size of the embeddings.
        quick_gelu: use QuickGELU, x sigmoid(1.702 x), in place of GELU.
        context_length, vocab_size, width, heads, layers, mlp_ratio: as in open_clip's `text_cfg`.
    """

    def __init__(
        self,
        dim: int,
        quick_gelu: bool,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        mlp_ratio: float,
    ):
        super().__init__()
        activation = QuickGELU if quick_gelu else nn.GELU
        hidden = int(width * mlp_ratio)
        # `Embedding` itself draws normal numbers; on meta, torch imports its compiler for that.
        table = torch.empty(vocab_size, width)
        self.token_embedding = nn.Embedding(vocab_size, width, _weight=table)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            _Block(width, heads, hidden, activation) for _ in range(layers)
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, dim))

    def forward(
        self, tokens: Int64[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n w"]]:
        """The embeddings, not normalised, and the states after the last norm."""
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((n, n), float("-inf"), device=x.device).triu_(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]
        return ends @ self.text_projection, x


def load_text_tower(
    dim: int, quick_gelu: bool, sizes: dict[str, Any], file: Path
) -> TextTower | None:
    """Build a tower with the weights of a safetensors file, of which it reads only its own.

    Returns:
        None if `sizes` has an option other than `OPTIONS`, or if the text tower in the file has
        tensors of other names or shapes.
    """
    if sizes.keys() - OPTIONS or file.suffix != ".safetensors":
        return None
    with torch.device("meta"):
        tower = TextTower(dim, quick_gelu, **sizes)
    own = {name: list(value.shape) for name, value in tower.state_dict().items()}
    state = some_of(file, lambda name: not name.startswith(_OTHERS), own)
    if state is None:
        return None
    tower.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return tower
