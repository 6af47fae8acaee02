"""Representation alignment: a network's hidden states learn to resemble a frozen encoder's.

REPA (2410.06940) maps the states of a transformer's early block to the encoder's patch tokens of
the clean picture, by a small projector. In a U-Net (U-REPA, 2503.18414) it is the middle block that
is aligned, the projection is resized to the encoder's grid, and a manifold loss compares how much
positions resemble one another.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.batch import Batch, image_key, image_size
from cascade.errors import UserError
from cascade.losses.watched import Call


@runtime_checkable
class Teacher(Protocol):
    """A frozen encoder of pictures, such as `FrozenCLIP`; `image_size` is the side of its input."""

    def to(self, device: torch.device) -> "Teacher": ...

    def image(self, x: Tensor) -> Float[Tensor, "b d"]: ...

    def patches(self, x: Tensor, layer: int) -> Float[Tensor, "b d h w"]: ...


def similar(
    ours: Float[Tensor, "b d h w"], theirs: Float[Tensor, "b d h w"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Two losses of each sample: of positions one by one, and of their relations.

    The first is 1 less the mean cosine of both vectors at a position (REPA). The second
    is the mean squared difference of the two matrices of cosines between positions (U-REPA's
    manifold loss, within a picture, so that no sample's loss depends on others).
    """
    ours, theirs = (F.normalize(x.flatten(2), dim=1) for x in (ours, theirs))
    apart = 1 - (ours * theirs).sum(1).mean(1)
    relations = (ours.mT @ ours - theirs.mT @ theirs).square().flatten(1).mean(1)
    return apart, relations


class Alignment(nn.Module):
    """The loss of alignment with a teacher: `weight` (tokens + `manifold` relations).

    Args:
        teacher: the frozen encoder. It sees the clean picture in its own size, if the data has it.
        block: path of the aligned block in the network, such as `middle.1` or `blocks.3`.
        layer: the teacher's layer that patch tokens are taken from, counted from its end; None:
            its pooled embedding.
        weight: of this loss.
        manifold: weight of the relations between positions (U-REPA; REPA has none).
        hidden: width of the projector's two hidden layers.
        until: share of the training after which it is switched off.
    """

    def __init__(
        self,
        teacher: Teacher,
        block: str,
        layer: int | None = -1,
        weight: float = 0.5,
        manifold: float = 3.0,
        hidden: int = 2048,
        until: float = 1.0,
    ):
        super().__init__()
        self.teacher: Any = teacher
        self.block, self.layer, self.hidden = block, layer, hidden
        self.weight, self.manifold, self.until = weight, manifold, until
        self.watched: tuple[Any, ...] = ()  # the block, which is no submodule

    def attached(self, stage: Any) -> "Alignment":
        """Finds the stage's block, and creates the projector for it; returns itself.

        Raises:
            UserError: the stage samples no pictures, or not squares alone, or its network has no
                such block.
        """
        if not image_size(stage.writes):
            raise UserError(f"alignment: {stage.writes} is no picture: leave alignment= out")
        if len(stage.codec.shapes) > 1:
            raise UserError("alignment: its teacher sees squares: leave it or buckets= out")
        block = _found(stage.net, self.block)
        size = self.teacher.image_size
        blank = torch.zeros(1, 3, size, size, device=stage.device)
        width = self._seen(blank).shape[1]
        layers = (nn.Linear(block.channels, self.hidden), nn.SiLU())
        layers += (nn.Linear(self.hidden, self.hidden), nn.SiLU(), nn.Linear(self.hidden, width))
        self.project = nn.Sequential(*layers).to(stage.device)
        self.watched = (block,)
        return self

    def active(self, done: float) -> bool:
        """Whether it is on once this share of the training is done."""
        return done < self.until

    def forward(self, stage: Any, batch: Batch, x0: Tensor, call: Call) -> Float[Tensor, " b"]:
        if not self.active(stage.done):  # each parameter gets a gradient, as DDP expects
            return 0 * sum(p.sum() for p in self.parameters()) * x0.new_ones(len(x0))
        picture = batch.get(image_key(self.teacher.image_size))
        theirs = self._seen(stage.codec.decode(x0) if picture is None else picture)
        states = call.states[self.watched[0]]
        if states.ndim == 3:  # a transformer's, of a square picture
            states = states.mT.unflatten(2, (round(states.shape[1] ** 0.5), -1))
        ours = self.project(states.movedim(1, 3)).movedim(3, 1).float()
        tokens, relations = similar(_resized(ours, theirs.shape[2:]), theirs.float())
        return self.weight * (tokens + self.manifold * relations)

    def _seen(self, picture: Tensor) -> Float[Tensor, "b d h w"]:
        teacher = self.teacher.to(picture.device)
        if self.layer is None:
            return teacher.image(picture)[:, :, None, None]
        return teacher.patches(picture, self.layer)


def _found(net: nn.Module, path: str) -> Any:
    """A block of a network, or of the one that it wraps."""
    while hasattr(net, "net"):
        net = net.net
    named = {name: m for name, m in net.named_modules() if hasattr(m, "channels")}
    if path not in named:
        raise UserError(f"alignment.block={path}: the network's blocks are {', '.join(named)}")
    return named[path]


def _resized(x: Float[Tensor, "b d h w"], size: tuple[int, ...]) -> Float[Tensor, "b d H W"]:
    if x.shape[2] > size[0]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear")
