"""How far a run has got: the one definition of its step, images and samples."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Position:
    """A place in a run, between two optimizer steps.

    Images and consumed samples differ after a rollback only: the loss spike's samples are never
    used again, but the steps that consumed them are taken again, with later samples.

    Args:
        step: optimizer steps so far, skipped ones included.
        batch: global batch size.
        offset: samples that rollbacks have passed over.
    """

    step: int
    batch: int
    offset: int = 0

    @property
    def images(self) -> int:
        """Images trained on: progress, the learning rate and the end of a run go by it."""
        return self.step * self.batch

    @property
    def consumed(self) -> int:
        """Samples read by all ranks together, which is the number of the next sample."""
        return self.images + self.offset

    def at(self, step: int) -> "Position":
        """Return the position after another number of steps, with no further rollback."""
        return replace(self, step=step)
