"""Records each bad sample of a run once, and stops the run if there are too many.

`skipped.jsonl` has a line for each: sample number, "shard/key", and reason. The ranks exchange what
they met every few steps and before each checkpoint, so that a run resumed from the checkpoint meets
again whatever was not yet written.
"""

import json
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from cascade.data.items import Skip
from cascade.data.tars.index import counted
from cascade.errors import UserError
from cascade.runs.run import event

SKIPPED = "skipped.jsonl"


class Skips(L.Callback):
    """Records and counts the bad samples that were replaced by others.

    Runs before the callback that saves checkpoints.

    Args:
        run: the run's directory.
        fraction: the run stops if more of its recent samples are bad (`data.max_skip_fraction`).
        save: saves a checkpoint before the run stops; called on all ranks.
        window: how many samples count as recent.
        every: optimizer steps between two exchanges among the ranks.

    Raises:
        UserError: on all ranks; too many samples are bad.
    """

    def __init__(
        self,
        run: Path,
        fraction: float,
        save: Callable[[L.Trainer, L.LightningModule], None],
        window: int = 10_000,
        every: int = 20,
    ):
        self.run, self.fraction, self.save = run, fraction, save
        self.window, self.every = window, every
        self.met: list[Skip] = []  # on this rank, since the last exchange
        # For each exchange: the number of samples since the last one, and the bad ones by reason.
        self.recent: deque[tuple[int, Counter[str]]] = deque()
        self.step, self.new = 0, 0
        self.reasons: dict[str, str] = {}  # by key; on rank 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.is_global_zero:
            self.reasons = _written(self.run / SKIPPED)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.met += batch.get("skipped", [])
        steps, last = trainer.global_step - self.step, trainer.global_step == trainer.max_steps
        if steps == 0 or (steps < self.every and not last):
            return
        self._exchange(trainer, module)
        samples = sum(samples for samples, _ in self.recent)
        reasons = sum((found for _, found in self.recent), Counter())
        bad = reasons.total()
        if bad > self.fraction * max(self.window, samples):
            self.save(trainer, module)
            raise UserError(
                f"{bad} of the last {samples} samples are bad, over {self.fraction:.1%} "
                f"({counted(reasons)}): repair those in {self.run / SKIPPED}, or allow more with "
                f"+data.max_skip_fraction=...; step {trainer.global_step} is saved, and the same "
                "command resumes from there"
            )

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        self._exchange(trainer, module)

    def _exchange(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Gather the skips of all ranks, and write them on rank 0."""
        skips, self.met = gathered(self.met, trainer.strategy.root_device), []
        steps, self.step = trainer.global_step - self.step, trainer.global_step
        # Count sample numbers, not skips: of two bad samples in a row, the second is met under
        # both numbers.
        reasons = Counter({skip.sample: skip.reason for skip in skips}.values())
        self.recent.append((steps * module.trained.batch, reasons))
        while sum(samples for samples, _ in self.recent) - self.recent[0][0] >= self.window:
            self.recent.popleft()
        if trainer.is_global_zero:
            self._write(skips)

    def _write(self, skips: list[Skip]) -> None:
        lines = []
        for skip in sorted(skips):
            if skip.key not in self.reasons:
                self.reasons[skip.key] = skip.reason
                lines.append(json.dumps(skip._asdict()) + "\n")
        if lines:
            with (self.run / SKIPPED).open("a") as file:
                file.writelines(lines)
        self.new += len(lines)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.new:
            totals = Counter(self.reasons.values())
            print(f"{self.run}: bad samples, replaced by the next good ones: {counted(totals)}")
            event(self.run, "bad samples", **totals)


def gathered(skips: list[Skip], device: torch.device) -> list[Skip]:
    """Return the skips of all ranks, on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return skips
    count = torch.tensor(len(skips), device=device)
    dist.all_reduce(count)
    if not count:
        return []
    lists: list[list[Skip]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, skips)
    return [skip for part in lists for skip in part]


def _written(path: Path) -> dict[str, str]:
    """Read the reasons by key that the run has written so far; remove a truncated last line."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    with path.open("r+b") as file:
        file.truncate(len(whole))
    lines = map(json.loads, filter(None, whole.split(b"\n")))
    return {line["key"]: line["reason"] for line in lines}
