"""Named feature spaces for evaluation: pictures [b, 3, h, w] to rows [b, d].

Every space sees 8-bit pictures, as they would be saved: uint8, or floats in [-1, 1], which are
rounded first. Pictures that are not square are squashed. A distance is named after its space; it is
called FID only with the Inception weights that define the FID, identified by their hash.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3

from cascade.encoders.weights import fault
from cascade.errors import UserError

_FILE = "pt_inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIDE = 299  # pixels of Inception's input


@runtime_checkable
class Features(Protocol):
    """A feature space: calling it gives float32 rows.

    Attributes:
        name: for tables and records.
        dim: d of the rows.
        hash: of the weights.
        resize: how pictures are resized to the network's input, in words.
    """

    name: str
    dim: int
    hash: str
    resize: str

    def __call__(self, pictures: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


@runtime_checkable
class CLIP(Protocol):
    """The interface of a CLIP that `CLIPFeatures` uses; `hash` identifies its weights."""

    name: str
    hash: str
    dim: int

    def image(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


def eight_bit(pictures: Shaped[Tensor, "*any"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures as uint8: unchanged if they are, or rounded from floats in [-1, 1].

    Floats in [0, 1] pass unnoticed, since they cannot be distinguished from bright pictures.

    Raises:
        UserError: the pictures are of another type or range, or not RGB.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        shape = list(pictures.shape)
        raise UserError(f"pictures are [b, 3, h, w], not {shape}: convert them to RGB, of one size")
    if pictures.dtype == torch.uint8:
        return pictures
    if not pictures.is_floating_point():
        raise UserError(f"pictures are {pictures.dtype}: convert them to 8 bits a channel")
    levels = ((pictures.float() + 1) * 127.5).round()
    if not ((levels >= 0) & (levels <= 255)).all():
        low, high = pictures.aminmax()
        raise UserError(
            f"pictures are in [{low:.3g}, {high:.3g}]: give floats in [-1, 1], or 8-bit integers"
        )
    return levels.byte()


class CLIPFeatures:
    """The unit-norm image embeddings of a CLIP, which should not be the conditioning one."""

    resize = "antialiased bicubic to the size that the CLIP sees"

    def __init__(self, clip: CLIP):
        self.clip = clip
        self.name = self._called(clip.hash)
        self.hash, self.dim = clip.hash, clip.dim

    def _called(self, hash: str) -> str:
        return f"CLIP features of {self.clip.name}, {hash[:8]}"

    @property
    def former(self) -> tuple[str, str] | None:
        """Name and hash of these features in earlier versions; None if they were ambiguous."""
        known = getattr(self.clip, "former", None)
        if known is None or self.clip.name in known.doubtful:
            return None
        return self._called(known.hash), known.hash

    @torch.no_grad()
    def __call__(self, pictures: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        x = eight_bit(pictures) / 127.5 - 1
        with full_precision():
            return F.normalize(self.clip.image(x).float(), dim=-1)


class Resize(NamedTuple):
    """A convention for resizing 8-bit pictures to Inception's input [b, 3, 299, 299]."""

    name: str
    words: str
    feed: Callable[[UInt8[Tensor, "b 3 h w"]], Float[Tensor, "b 3 299 299"]]


def _clean(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    size = (_SIDE, _SIDE)
    x = F.interpolate(x.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
    return (x - 128) / 128


def _pytorch_fid(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    return 2 * F.interpolate(x / 255, (_SIDE, _SIDE), mode="bilinear", align_corners=False) - 1


def _tensorflow(x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    x = x.float()
    for axis in (3, 2):
        size = x.shape[axis]
        at = torch.arange(_SIDE, dtype=torch.float32, device=x.device) * (size / _SIDE)
        low = at.long()
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = a + (b - a) * (at - low).view([-1 if i == axis else 1 for i in range(4)])
    return (x - 128) / 128


# The modes of clean-fid (arXiv 2104.11222): "clean", "legacy_pytorch", and "legacy_tensorflow",
# which is torch-fidelity's and the original's: no half-pixel offset, and no antialiasing.
CLEAN = Resize("clean", "clean-fid: antialiased bicubic to 299 px, not quantised", _clean)
PYTORCH_FID = Resize("pytorch-fid", "pytorch-fid: bilinear to 299 px", _pytorch_fid)
TENSORFLOW = Resize("tensorflow", "TensorFlow 1: bilinear to 299 px", _tensorflow)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the Inception-v3 that defines the FID.

    Args:
        path: a local copy of pytorch-fid's pt_inception-2015-12-05-6726825d.pth (also distributed
            as torch-fidelity's weights-inception-2015-12-05-6726825d.pth).
        sha256: of that file.
        resize: `CLEAN`, `PYTORCH_FID` or `TENSORFLOW`; distances under different conventions do not
            compare.

    Raises:
        UserError: the file is missing, or its hash differs.
    """

    dim = 2048

    def __init__(self, path: str | Path, sha256: str = FID_SHA256, resize: Resize = CLEAN):
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"no Inception weights at {path}: copy {_FILE} there")
        with open(path, "rb") as file:
            self.hash = hashlib.file_digest(file, "sha256").hexdigest()
        if self.hash != sha256:
            found = fault(Path(path)) or f"copy {_FILE} again"
            raise UserError(f"{path} has SHA-256 {self.hash}, not {sha256}: {found}")
        self.name, self.resize = f"Inception-v3 pooled features, {self.hash[:8]}", resize.words
        self._feed = resize.feed
        self.net = inception()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.register_buffer("_classes", self.net.fc.weight.detach().clone())
        self.net.fc = nn.Identity()
        self.net.to(memory_format=torch.channels_last)  # a third faster on CPUs
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        x = eight_bit(pictures).to(self._classes.device)
        with full_precision():
            return self.net(self._feed(x))

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "b 2048"]) -> Float[Tensor, "b 1008"]:
        """Class logits of pooled features for the Inception score, without biases as originally."""
        return features.to(self._classes) @ self._classes.T


def full_precision() -> AbstractContextManager[None]:
    """A context without TF32, which would change distances in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def inception() -> Inception3:
    """torchvision's Inception-v3 with 1008 logits and the pooling of the TensorFlow graph of 2015.

    It differs from torchvision's in two ways: average pooling in the branches excludes the padding,
    and the last block (Mixed_7c) uses max pooling.
    """
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        block = net.get_submodule(f"Mixed_{name}")
        block.branch_pool.register_forward_pre_hook(_leave_padding_out)
    net.Mixed_7c.register_forward_hook(_pool_by_maximum)
    return net


def _leave_padding_out(_: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Scales padded 3 x 3 averages to averages without the padding."""
    share = F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, stride=1, padding=1)
    return args[0] / share


def _pool_by_maximum(block: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Recomputes the last channels, those of the pooled branch, with max pooling."""
    branch = block.branch_pool(F.max_pool2d(args[0], 3, stride=1, padding=1))
    return torch.cat([output[:, : -branch.shape[1]], branch], dim=1)


def distance_name(features: Features) -> str:
    """The name of the Fréchet distance in a space: "FID" only with the FID's Inception."""
    if isinstance(features, InceptionFeatures) and features.hash == FID_SHA256:
        return "FID"
    return f"Fréchet distance ({features.name})"
