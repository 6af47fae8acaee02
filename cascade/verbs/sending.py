"""From overrides to tasks: what `train`, `sweep` and `launch` do alike to send a training off."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.done import finished
from cascade.files import check_writable
from cascade.slurm.plan import FROZEN, Launcher, Link, Task, launch
from cascade.verbs.checks import check_identity, shares
from cascade.verbs.configuration import built, composed

LAUNCHER = "launcher"


def split(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of some keys and all beneath them, and the others."""

    def ours(override: str) -> bool:
        path = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]
        return f"{path}.".startswith(tuple(f"{key}." for key in keys))

    return [o for o in overrides if ours(o)], [o for o in overrides if not ours(o)]


def training(
    overrides: Sequence[str], launcher: Launcher, resources: Mapping[str, Any] | None = None
) -> tuple[Task, DictConfig]:
    """A training as a task, with its resolved configuration.

    Raises:
        UserError: before anything waits in a queue: the configuration is wrong, its directory is
            another's, or the batch cannot be shared among so many ranks.
    """
    ranks = launcher.ranks(resources or {})
    config = composed("train", [*overrides, *(f"trainer.{key}={n}" for key, n in ranks.items())])
    folder = Path(config.run).absolute()
    check_identity(config, folder)
    if ranks:
        shares(config.batch, config.micro_batch, math.prod(ranks.values()))
    command = ("train", "--config", str(folder / FROZEN))
    done = finished(folder, config.images)
    return Task(folder, command, OmegaConf.to_yaml(config, resolve=True), done), config


def send(own: Sequence[str], overrides: Sequence[str]) -> None:
    """Sends one training off; `own` are the overrides that choose the launcher."""
    launcher = built(composed("launcher", own).launcher)
    task, _ = training(overrides, launcher)
    check_writable(task.folder, "choose another run=...")
    launch(launcher, task.folder, [Link("train", [task])])
