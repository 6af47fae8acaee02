"""The roles of the objects that a stage is composed of, and what it asks of them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from cascade.batch import Batch
from cascade.conditioning import Cond
from cascade.diffusion.distillation import Carry
from cascade.diffusion.gaussian import Targets
from cascade.diffusion.sampling import Watch
from cascade.draws import Draws


@runtime_checkable
class Objective(Protocol):
    """A stage's loss: that of a diffusion (`Process`), or of predicting the next token."""

    def loss(self, net: Any, x0: Tensor, cond: Cond, noise: Draws) -> Float[Tensor, " b"]: ...


class Lesson(NamedTuple):
    """What a teacher shows a stage of an encoded batch.

    Attributes:
        process: what the loss of the stage's process takes.
        rows: for which of them the teacher has `sketch`; the others' is to be x0.
    """

    process: Carry | Targets
    rows: Bool[Tensor, " b"] | None = None
    sketch: Float[Tensor, "r *d"] | None = None


# Shows a stage, the second argument, what to learn of an encoded batch.
Teacher = Callable[[Batch, Any], Lesson]


@runtime_checkable
class Sampler(Protocol):
    """Draws x0; with a scale other than 1, guided away from a weaker (network, condition)."""

    scale: float

    def __call__(
        self,
        process: Objective,
        net: Any,
        shape: tuple[int, ...],
        cond: Cond,
        weaker: tuple[Any, Cond] | None,
        noise: Draws,
        progress: Watch | None = None,
    ) -> Tensor: ...


class Asked(NamedTuple):
    """The arguments of a `Sampler`, after the process, that a batch determines."""

    net: Any
    shape: tuple[int, ...]
    cond: Cond
    weaker: tuple[Any, Cond] | None
    noise: Draws
