"""Named feature spaces for evaluation: pictures [b, 3, h, w] to rows [b, d].

Every space looks at 8-bit pictures, as they would lie in a file: uint8, or floats in [-1, 1] that
are rounded first. Pictures that are not square are squashed. A distance is named after its space,
and is called FID only where the features are those of the Inception network with which the FID is
defined, down to the hash of its weights.
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
_SIDE = 299  # of the pictures that Inception sees


@runtime_checkable
class Features(Protocol):
    """A feature space: the call gives float32 rows.

    `name` says which, `dim` how wide, `hash` identifies the weights, and `resize` says in words how
    pictures are brought to the size that the network sees.
    """

    name: str
    dim: int
    hash: str
    resize: str

    def __call__(self, pictures: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


@runtime_checkable
class CLIP(Protocol):
    """What `CLIPFeatures` needs of a CLIP; `hash` identifies its weights."""

    name: str
    hash: str
    dim: int

    def image(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...


def eight_bit(pictures: Shaped[Tensor, "*any"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures as bytes: those that are, and floats in [-1, 1], rounded.

    Raises:
        UserError: they are neither, or not RGB. (Floats in [0, 1] cannot be told from dark ones.)
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
    """The unit-norm picture embeddings of a CLIP: judge with another one than conditions."""

    resize = "antialiased bicubic to the size that the CLIP sees"

    def __init__(self, clip: CLIP):
        self.clip = clip
        self.name = self._called(clip.hash)
        self.hash, self.dim = clip.hash, clip.dim

    def _called(self, hash: str) -> str:
        return f"CLIP features of {self.clip.name}, {hash[:8]}"

    @property
    def former(self) -> tuple[str, str] | None:
        """Name and hash of these features in earlier versions; None if they meant others too."""
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
    """A convention for bringing 8-bit pictures to what Inception is fed: [b, 3, 299, 299]."""

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


# clean-fid's own (arXiv 2104.11222), its "legacy_pytorch", and its "legacy_tensorflow", which is
# torch-fidelity's and the original's: corners are aligned to the left, and nothing is antialiased.
CLEAN = Resize("clean", "clean-fid: antialiased bicubic to 299 px, not quantised", _clean)
PYTORCH_FID = Resize("pytorch-fid", "pytorch-fid: bilinear to 299 px", _pytorch_fid)
TENSORFLOW = Resize("tensorflow", "TensorFlow 1: bilinear to 299 px", _tensorflow)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the Inception-v3 that the FID is defined by.

    Args:
        path: a local copy of pytorch-fid's pt_inception-2015-12-05-6726825d.pth (also distributed
            as torch-fidelity's weights-inception-2015-12-05-6726825d.pth).
        sha256: of that file; another is refused.
        resize: `CLEAN`, `PYTORCH_FID` or `TENSORFLOW`; distances differ, and do not compare.

    Raises UserError where the file is missing or another one.
    """

    dim = 2048

    def __init__(self, path: str | Path, sha256: str = FID_SHA256, resize: Resize = CLEAN):
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"no Inception weights at {path}: copy {_FILE} there by hand")
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
        """For the Inception score, of the pooled features, without biases as in the original."""
        return features.to(self._classes) @ self._classes.T


def full_precision() -> AbstractContextManager[None]:
    """Convolutions in full float32 on GPUs as on CPUs: TF32 would show in the third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def inception() -> Inception3:
    """torchvision's Inception-v3 with the pooling of the TensorFlow graph of 2015, and 1008 logits.

    Two things differ from torchvision's: the averages of the pooled branches leave the padding out,
    and the last block (Mixed_7c) pools by maximum.
    """
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        block = net.get_submodule(f"Mixed_{name}")
        block.branch_pool.register_forward_pre_hook(_leave_padding_out)
    net.Mixed_7c.register_forward_hook(_pool_by_maximum)
    return net


def _leave_padding_out(_: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Averages of 3 x 3 with zeros around them, without the zeros."""
    share = F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, stride=1, padding=1)
    return args[0] / share


def _pool_by_maximum(block: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The block's output with its last channels, those of the pooled branch, computed again."""
    branch = block.branch_pool(F.max_pool2d(args[0], 3, stride=1, padding=1))
    return torch.cat([output[:, : -branch.shape[1]], branch], dim=1)


def distance_name(features: Features) -> str:
    """What a Fréchet distance in this space may be called: "FID" only with the FID's Inception."""
    if isinstance(features, InceptionFeatures) and features.hash == FID_SHA256:
        return "FID"
    return f"Fréchet distance ({features.name})"
