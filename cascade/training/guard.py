"""A step that went wrong moves nothing: all ranks skip it, or go back behind it, together.

Decided within the optimizer's step, behind the backward pass and before gradients are clipped, on
two numbers that all ranks share: the sum of their losses and of their gradient norms, which is
finite only if all are. That reduction and reading it is all that a good step costs.
"""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cascade.errors import Failed
from cascade.files import write_atomically
from cascade.training.checkpoint import FOLDER
from cascade.training.events import event

BAD_BATCHES = "bad_batches.jsonl"
ROLLBACKS = "rollbacks.json"
IN_A_ROW, PER_THOUSAND, PER_RUN = 3, 10, 3  # bad steps, bad steps, rollbacks: one more is too many


class RollBack(Exception):
    """The loss jumped: the run is to be started again, from its newest checkpoint.

    Before it is raised `rollbacks.json` tells where that start goes on (`passed_over`), and
    checkpoints of the jump are put aside.
    """


class Guard(L.Callback):
    """Skips steps whose loss or gradient is not finite, and goes back before a jump of the loss.

    A skipped step leaves weights, moments and average as they are, and its samples are written to
    `bad_batches.jsonl`; the learning rate, which goes by images, moves on. It stands before all
    callbacks that look at gradients.

    Args:
        run: the run's directory.
        offset: samples that rollbacks have passed over: consumed = images + offset.
        spike: a jump is a loss or a gradient norm over median + `spike` MADs (median absolute
            deviations) of the last `window` steps. None: nothing is a jump.
        window: steps.

    Raises:
        Failed: over 3 bad steps in a row, or 10 among 1,000; or a jump behind 3 rollbacks.
        RollBack: at a jump.
    """

    def __init__(self, run: Path, offset: int = 0, spike: float | None = None, window: int = 200):
        self.run, self.offset, self.spike = run, offset, spike
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.skipped: list[int] = []
        self._batches: list[dict[str, Any]] = []
        self._micro_losses: list[Tensor] = []

    def on_train_start(self, trainer, module) -> None:
        self.rollbacks = trainer.strategy.broadcast(len(rollbacks(self.run)))

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._batches.append({"samples": batch["sample"], "keys": batch.get("key", [])})

    def on_before_backward(self, trainer, module, loss: Tensor) -> None:
        self._micro_losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()
        own = torch.stack([torch.stack(self._micro_losses).sum().float(), norm.float()])
        mean = own / trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
        loss, norm = mean.tolist()
        batches, self._batches, self._micro_losses = self._batches, [], []
        if not math.isfinite(loss + norm):
            self._skip(trainer, module, own, batches)
        elif self.spike is not None:
            self._look_for_a_jump(trainer, module, loss, norm)

    def _skip(self, trainer, module, own: Tensor, batches: Sequence[dict[str, Any]]) -> None:
        module.zero_grad()  # to None: an optimizer passes over parameters without a gradient
        step = trainer.global_step
        loss, norm = own.tolist()
        samples = [n for batch in batches for n in batch["samples"].tolist()]
        keys = [key for batch in batches for key in batch["keys"]]
        # As text, since JSON has no word for these numbers.
        mine = {"loss": str(loss), "gradient": str(norm), "samples": samples, "keys": keys}
        ranks = [mine]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, mine)
        self.skipped = [s for s in self.skipped if s > step - 1000] + [step]
        if trainer.is_global_zero:
            with (self.run / BAD_BATCHES).open("a") as file:
                file.write(json.dumps({"step": step, "ranks": ranks}) + "\n")
            event(
                self.run, "skipped step", step=step, samples=sum(len(r["samples"]) for r in ranks)
            )
        in_a_row = self.skipped[-IN_A_ROW - 1 :] == list(range(step - IN_A_ROW, step + 1))
        if in_a_row or len(self.skipped) > PER_THOUSAND:
            raise Failed(
                f"the loss or a gradient was not finite {len(self.skipped)} times in 1,000 steps, "
                f"last at step {step}: {self.run / BAD_BATCHES} names the samples, "
                f"{_newest(self.run)} is kept; lower the learning rate, or leave those samples out"
            )

    def _look_for_a_jump(self, trainer, module, loss: float, norm: float) -> None:
        if _outlies(loss, self.losses, self.spike) or _outlies(norm, self.norms, self.spike):
            if trainer.is_global_zero:
                self._go_back(trainer.global_step, module.batch, loss, norm)
            trainer.strategy.barrier()
            if self.rollbacks == PER_RUN:
                raise Failed(
                    f"the loss jumped to {loss:.4g} (gradient {norm:.4g}) at step "
                    f"{trainer.global_step}, after {PER_RUN} rollbacks: {_newest(self.run)} is "
                    "kept; lower the learning rate"
                )
            raise RollBack(
                f"the loss jumped to {loss:.4g} (gradient {norm:.4g}) at step "
                f"{trainer.global_step}; back to {_newest(self.run)}"
            )
        self.losses.append(loss)
        self.norms.append(norm)

    def _go_back(self, step: int, batch: int, loss: float, norm: float) -> None:
        """Writes down where to go on, and then puts aside what was saved since the jump began.

        It began with the steps just before that were above the median already.
        """
        median = statistics.median(self.losses)
        begun = step
        for earlier in reversed(self.losses):
            if earlier <= median:
                break
            begun -= 1
        facts = {"step": step, "begun": begun, "loss": loss, "gradient": norm}
        if self.rollbacks == PER_RUN:
            event(self.run, "one jump too many", **facts)
            return
        facts["consumed"] = (step + 1) * batch + self.offset
        past = [*rollbacks(self.run), facts]
        write_atomically(self.run / ROLLBACKS, lambda p: p.write_text(json.dumps(past) + "\n"))
        for path in (self.run / FOLDER).glob("step-*"):
            if int(path.stem.split("-")[1]) >= begun:  # the loss of step n is that of checkpoint n
                os.replace(path, path.with_name(f"aside-{len(past)}-{path.name}"))
        event(self.run, "rollback", **facts, to=_newest(self.run))

    def state_dict(self) -> dict[str, list]:
        return {"skipped": self.skipped, "losses": [*self.losses], "norms": [*self.norms]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.skipped = state["skipped"]
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])


def rollbacks(run: Path) -> list[dict[str, Any]]:
    """What was decided at each jump of the loss: `step`, when it had `begun`, `consumed`, ..."""
    path = run / ROLLBACKS
    return json.loads(path.read_text()) if path.exists() else []


def passed_over(run: Path) -> int:
    """The sample number before which rollbacks forbid to go on; 0 without any.

    Positions only grow, so a run goes on at this or at its checkpoint's, whichever is greater.
    """
    return max((decision["consumed"] for decision in rollbacks(run)), default=0)


def _outlies(value: float, history: deque[float], mads: float) -> bool:
    if len(history) < history.maxlen:
        return False
    median = statistics.median(history)
    return value > median + mads * statistics.median(abs(x - median) for x in history)


def _newest(run: Path) -> str:
    names = sorted(path.name for path in (run / FOLDER).glob("step-*"))
    return f"{FOLDER}/{names[-1]}" if names else "the beginning"
