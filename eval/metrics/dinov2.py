"""The feature space of a DINOv2 (see `features.py`)."""

from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from cascade.encoders.identity import identity
from cascade.encoders.weights import read_json, reading, weights_hash
from cascade.errors import UserError
from cascade.eval.metrics.features import eight_bit, full_precision

# The choices that the shapes of the weights do not determine.
_DINOV2_CHOICES = ("num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias")


class DINOv2Features(nn.Module):
    """The CLS token after the final norm of a DINOv2, for FD_DINOv2 (arXiv 2306.04675: ViT-L/14).

    Pictures are resized to 224 px (antialiased bicubic) and normalised as for ImageNet. Position
    embeddings are interpolated to 16 x 16 patches as in the published code, whose scale factor is
    (16 + 0.1) / n; transformers uses 16 / n.

    Args:
        folder: a local copy of the published repository in the format of transformers.

    Raises:
        UserError: a file is missing, unreadable or of another architecture.
    """

    resize = "antialiased bicubic to 224 px"

    def __init__(self, folder: str | Path):
        super().__init__()
        weights = Path(folder) / "model.safetensors"
        for file in (Path(folder) / "config.json", weights):
            if not file.is_file():
                raise UserError(f"no {file.name} in {folder}: copy facebook/dinov2-large's there")
        with reading([weights], f"a DINOv2 in {folder}"):
            self.net = _dinov2(Path(folder))
        kept = weights_hash([weights])
        choices = {name: getattr(self.net.config, name) for name in _DINOV2_CHOICES}
        self.hash = identity(kept, choices)
        called = f"DINOv2 features of {Path(folder).name}, "
        self.name, self.former = called + self.hash[:8], (called + kept[:8], kept)
        self.dim = self.net.config.hidden_size
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        x = eight_bit(pictures).to(self.net.device).float()
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = (
            torch.tensor(values, device=x.device).view(3, 1, 1)
            for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        with full_precision():
            return self.net((x - mean) / std).last_hidden_state[:, 0]


def _dinov2(folder: Path) -> nn.Module:
    """The network. UserError if the configuration or a tensor is of another architecture."""
    from transformers import Dinov2Config, Dinov2Model

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "dinov2":
        raise UserError(
            f"{folder / 'config.json'} has model_type {kind}, not dinov2: copy "
            "facebook/dinov2-large's files there"
        )
    net, found = Dinov2Model.from_pretrained(
        folder,
        config=Dinov2Config.from_pretrained(folder, local_files_only=True),
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    for what, keys in (("lacks", "missing_keys"), ("also has", "unexpected_keys")):
        if names := sorted(found[keys]):
            raise UserError(
                f"{folder}: model.safetensors {what} {names[0]} and {len(names) - 1} more tensors "
                "compared to config.json: copy both files from one model"
            )
    patches = 224 // net.config.patch_size
    table = _positions(net.embeddings.position_embeddings, patches)
    net.embeddings.position_embeddings = nn.Parameter(table)
    return net


def _positions(table: Float[Tensor, "1 n d"], side: int) -> Float[Tensor, "1 m d"]:
    """Position embeddings for side x side patches, interpolated as in facebookresearch/dinov2."""
    old = int((table.shape[1] - 1) ** 0.5)
    if old == side:
        return table.detach()
    grid = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).detach()
