"""Prior preservation: samples of a class, for which a stage is to predict what it did before."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.batch import Batch
from cascade.data.loading import chosen
from cascade.diffusion.gaussian import Process, call
from cascade.roles import Lesson
from cascade.runs.run import Run
from cascade.stage import Stage
from cascade.trainable import Trainable


@dataclass(frozen=True)
class Preserving:
    """A stage as it was, which shows its own predictions of samples to preserve: a `Teacher`.

    The targets of DreamBooth's second half (2208.12242, equation 2) are pictures, which scatter
    about what the stage predicts at any noise level. Its own predictions do not (learning without
    forgetting, 1606.09282), so this half has no gradient until the stage changes, and then leads
    back. A sketch is preserved likewise.
    """

    stage: Stage

    def __call__(self, batch: Batch, student: Stage) -> Lesson:
        """Shows the targets of the rows that are `preserved`."""
        base, rows = self.stage.to(student.device), batch["preserved"]
        some = chosen(batch, rows)
        with torch.no_grad():
            cond = base.conditioner(some, student.draws("drop", some))
            net = base.noisy(some, lambda: student.draws("augmentation", some))

            def targets(x: Tensor, logsnr: Tensor, F_star: Tensor) -> Tensor:
                with torch.no_grad():
                    F = call(net, x[rows], logsnr[rows], cond)
                # Of a learned variance, the first half is F.
                return F_star.index_put((rows,), F[:, : F_star.shape[1]].to(F_star))

        return Lesson(targets, rows, cond.sketch)


def preserve(module: Trainable, base: Run) -> None:
    """Lets a stage learn what to preserve from its base, if its process predicts x0."""
    if isinstance(module, Stage) and isinstance(module.process, Process):
        module.teacher = Preserving(base.load())
