"""Trainings as tasks: what `train`, `sweep` and `launch` share to submit one."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.config.checks import accumulation
from cascade.config.compose import built, composed
from cascade.files.atomic import check_writable
from cascade.runs.done import FROZEN, finished
from cascade.runs.resumable import check_resumable
from cascade.runs.run import Run
from cascade.slurm.plan import Launcher, Task, TaskGroup, launch

LAUNCHER = "launcher"


def split(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of some keys, including nested ones, and the others."""

    def ours(override: str) -> bool:
        path = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]
        return f"{path}.".startswith(tuple(f"{key}." for key in keys))

    return [o for o in overrides if ours(o)], [o for o in overrides if not ours(o)]


def training_task(
    overrides: Sequence[str], launcher: Launcher, resources: Mapping[str, Any] | None = None
) -> tuple[Task, DictConfig]:
    """Return a training as a task, and its resolved configuration.

    Raises:
        UserError: the configuration is wrong, its directory belongs to another run, or the batch
            cannot be divided among the ranks. This is found before anything is queued.
    """
    ranks = launcher.ranks(resources or {})
    config = composed("train", [*overrides, *(f"trainer.{key}={n}" for key, n in ranks.items())])
    folder = Path(config.run).absolute()
    check_resumable(config, Run(folder))
    if ranks:
        accumulation(config.batch, config.micro_batch, math.prod(ranks.values()))
    command = ("train", "--config", str(folder / FROZEN))
    done = finished(folder, config.images)
    return Task(folder, command, OmegaConf.to_yaml(config, resolve=True), done), config


def submit_training(own: Sequence[str], overrides: Sequence[str]) -> None:
    """Submit one training; `own` are the overrides that choose the launcher."""
    launcher = built(composed("launcher", own).launcher)
    task, _ = training_task(overrides, launcher)
    check_writable(task.folder, "choose another run=...")
    launch(launcher, task.folder, [TaskGroup("train", [task])])
