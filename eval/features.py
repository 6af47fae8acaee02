"""Named feature spaces for evaluation: pictures [b, 3, h, w] in [-1, 1] to rows [b, d].

A distance is named after its space, and is called FID only where the features are those of the
Inception network with which the FID is defined, down to the hash of its weights.
"""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3

from cascade.errors import UserError

_FILE = "pt_inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@runtime_checkable
class Features(Protocol):
    """A feature space: `name` says which, `dim` how wide, and the call gives float32 rows."""

    name: str
    dim: int

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


@runtime_checkable
class CLIP(Protocol):
    """What `CLIPFeatures` needs of a CLIP; `hash` identifies its weights."""

    name: str
    hash: str
    dim: int

    def image(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


class CLIPFeatures:
    """The unit-norm picture embeddings of a CLIP: judge with another one than conditions."""

    def __init__(self, clip: CLIP):
        self.clip = clip
        self.name = f"CLIP features of {clip.name}, {clip.hash[:8]}"
        self.dim = clip.dim

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return F.normalize(self.clip.image(pictures).float(), dim=-1)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the Inception-v3 that the FID is defined by.

    Weights: a local copy of pytorch-fid's pt_inception-2015-12-05-6726825d.pth (also distributed as
    torch-fidelity's weights-inception-2015-12-05-6726825d.pth), refused unless its SHA-256 is
    `sha256`. Resizing is clean-fid's (arXiv 2104.11222): 8-bit pictures, antialiased bicubic to
    299 x 299, clipped but not quantised, then (x - 128) / 128.

    Raises UserError where the file is missing or another one.
    """

    name = "Inception-v3 pooled features, clean-fid resizing"
    dim = 2048

    def __init__(self, path: str | Path, sha256: str = FID_SHA256):
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"no Inception weights at {path}: copy {_FILE} there by hand")
        with open(path, "rb") as file:
            self.hash = hashlib.file_digest(file, "sha256").hexdigest()
        if self.hash != sha256:
            raise UserError(f"{path} has SHA-256 {self.hash}, not {sha256}: copy {_FILE} again")
        self.net = inception()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.fc = nn.Identity()  # past the pooled features lie only the 1008 logits
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        x = ((pictures.float() + 1) * 127.5).round().clamp(0, 255)
        x = F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net((x - 128) / 128)


def inception() -> Inception3:
    """torchvision's Inception-v3 with the pooling of the TensorFlow graph of 2015, and 1008 logits.

    Two things differ from torchvision's: the averages of the pooled branches leave the padding out,
    and the last block (Mixed_7c) pools by maximum.
    """
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        net.get_submodule(f"Mixed_{name}").register_forward_hook(_repool_average)
    net.Mixed_7c.register_forward_hook(_repool_max)
    return net


def _repool_average(block: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    pooled = F.avg_pool2d(args[0], 3, stride=1, padding=1, count_include_pad=False)
    return _repool(block, pooled, output)


def _repool_max(block: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return _repool(block, F.max_pool2d(args[0], 3, stride=1, padding=1), output)


def _repool(block: nn.Module, pooled: Tensor, output: Tensor) -> Tensor:
    """The block's output with its last channels, those of the pooled branch, computed again."""
    branch = block.branch_pool(pooled)
    return torch.cat([output[:, : -branch.shape[1]], branch], dim=1)


def distance_name(features: Features) -> str:
    """What a Fréchet distance in this space may be called: "FID" only with the FID's Inception."""
    if isinstance(features, InceptionFeatures) and features.hash == FID_SHA256:
        return "FID"
    return f"Fréchet distance ({features.name})"
