"""Skips non-finite steps, and rolls the run back after a loss spike, on all ranks together.

The decision is made after the backward pass and before gradients are clipped, from two numbers that
all ranks share: the mean of their losses and of their gradient norms, which is finite only if every
rank's is. A good step costs no more than this reduction and its transfer to the CPU.
"""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cascade.errors import Failed
from cascade.files.atomic import write_text
from cascade.runs.run import Position, Run, event

BAD_BATCHES = "bad_batches.jsonl"
ROLLBACKS = "rollbacks.json"
# The most bad steps in a row, bad steps in 1,000, and rollbacks that a run survives.
IN_A_ROW, PER_THOUSAND, PER_RUN = 3, 10, 3


class Rollback(Exception):
    """The loss spiked: restart the run from its newest checkpoint.

    When it is raised, `rollbacks.json` already records where to resume (`resume_from`), and the
    checkpoints since the spike began are set aside.
    """


class Guard(L.Callback):
    """Skips steps whose loss or gradient is not finite, and rolls back after a loss spike.

    A skipped step leaves weights, moments and average unchanged and records its samples in
    `bad_batches.jsonl`; the learning rate, a function of images seen, advances. Runs before all
    callbacks that read gradients.

    Args:
        run: the run's directory.
        start: where this process starts or resumes.
        spike: a loss or gradient norm above median + `spike` MADs (median absolute deviations) of
            the last `window` steps is a spike. None: nothing is.
        window: in steps.

    Raises:
        Failed: more than 3 bad steps in a row or 10 in 1,000, or a spike after 3 rollbacks.
        Rollback: after a spike.
    """

    def __init__(self, run: Path, start: Position, spike: float | None = None, window: int = 200):
        self.run, self.start, self.spike = run, start, spike
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
        if hasattr(norm, "full_tensor"):  # sharded gradients
            norm = norm.full_tensor()
        # Lightning has divided each micro-batch's loss by their number: the sum is their mean.
        own = torch.stack([torch.stack(self._micro_losses).sum().float(), norm.float()])
        mean = own / trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
        loss, norm = mean.tolist()
        batches, self._batches, self._micro_losses = self._batches, [], []
        if not math.isfinite(loss + norm):
            self._skip(trainer, module, own, batches)
        elif self.spike is not None:
            self._check_spike(trainer, loss, norm)

    def _skip(self, trainer, module, own: Tensor, batches: Sequence[dict[str, Any]]) -> None:
        module.zero_grad()  # to None: optimizers ignore parameters without a gradient
        step = trainer.global_step
        loss, norm = own.tolist()
        samples = [n for batch in batches for n in batch["samples"].tolist()]
        keys = [key for batch in batches for key in batch["keys"]]
        # As text: JSON cannot express nan and inf.
        mine = {"loss": str(loss), "gradient": str(norm), "samples": samples, "keys": keys}
        ranks = [mine]
        if trainer.world_size > 1:
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, mine)
        self.skipped = [s for s in self.skipped if s > step - 1000] + [step]
        if trainer.is_global_zero:
            with (self.run / BAD_BATCHES).open("a") as file:
                file.write(json.dumps({"step": step, "ranks": ranks}) + "\n")
            count = sum(len(rank["samples"]) for rank in ranks)
            event(self.run, "skipped step", step=step, samples=count)
        in_a_row = self.skipped[-IN_A_ROW - 1 :] == list(range(step - IN_A_ROW, step + 1))
        if in_a_row or len(self.skipped) > PER_THOUSAND:
            raise Failed(
                f"the loss or a gradient was not finite {len(self.skipped)} times in 1,000 steps, "
                f"last at step {step}: {self.run / BAD_BATCHES} names the samples, "
                f"{_newest(self.run)} is kept; lower the learning rate, or remove those samples"
            )

    def _check_spike(self, trainer, loss: float, norm: float) -> None:
        if _outlies(loss, self.losses, self.spike) or _outlies(norm, self.norms, self.spike):
            if trainer.is_global_zero:
                self._roll_back(trainer.global_step, loss, norm)
            trainer.strategy.barrier()
            what = f"loss spike at step {trainer.global_step}: loss {loss:.4g}, gradient {norm:.4g}"
            if self.rollbacks == PER_RUN:
                raise Failed(
                    f"{what}, after {PER_RUN} rollbacks: {_newest(self.run)} is kept; lower the "
                    "learning rate"
                )
            raise Rollback(f"{what}; rolling back to {_newest(self.run)}")
        self.losses.append(loss)
        self.norms.append(norm)

    def _roll_back(self, step: int, loss: float, norm: float) -> None:
        """Record where to resume, then set aside the checkpoints since the spike began.

        In this order: a kill in between leaves checkpoints that are still safe to resume from. The
        spike began with the unbroken run of steps before this one whose loss exceeded the median.
        """
        median = statistics.median(self.losses)
        begun = step - len([*takewhile(lambda loss: loss > median, reversed(self.losses))])
        facts = {"step": step, "begun": begun, "loss": loss, "gradient": norm}
        if self.rollbacks == PER_RUN:
            event(self.run, "one jump too many", **facts)
            return
        facts["consumed"] = self.start.at(step + 1).consumed  # this step's samples included
        past = [*rollbacks(self.run), facts]
        write_text(self.run / ROLLBACKS, json.dumps(past) + "\n")
        for saved, path in Run(self.run).checkpoints():
            if saved >= begun:  # checkpoint n precedes step n, whose loss is that of its weights
                os.replace(path, path.with_name(f"aside-{len(past)}-{path.name}"))
        event(self.run, "rollback", **facts, to=_newest(self.run))

    def state_dict(self) -> dict[str, list]:
        return {"skipped": self.skipped, "losses": [*self.losses], "norms": [*self.norms]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.skipped = state["skipped"]
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])


def rollbacks(run: Path) -> list[dict[str, Any]]:
    """Return the run's rollbacks: `step` of the spike, where it had `begun`, `consumed`, ..."""
    path = run / ROLLBACKS
    return json.loads(path.read_text()) if path.exists() else []


def resume_from(run: Path) -> int:
    """Return the first sample number that rollbacks allow; 0 without any.

    A run resumes from this or from its checkpoint's number, whichever is greater.
    """
    return max((rollback["consumed"] for rollback in rollbacks(run)), default=0)


def _outlies(value: float, history: deque[float], mads: float) -> bool:
    if len(history) < history.maxlen:
        return False
    median = statistics.median(history)
    return value > median + mads * statistics.median(abs(x - median) for x in history)


def _newest(run: Path) -> str:
    saved = Run(run).checkpoints()
    return str(saved[-1].path.relative_to(run)) if saved else "the beginning"
