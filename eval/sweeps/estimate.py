"""What a sweep would still run, and how long that takes, before anything is sent.

The speed of a training is that of runs of its group that have metrics, or else of a few steps timed
on this machine, without data and frozen encoders. From one training to another it is scaled by the
FLOPs of a step, as `cascade describe` counts them. Sampling is as fast as in the cells that were
measured.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from cascade.batch import Batch
from cascade.config.compose import built
from cascade.eval.sweeps.folder import Point
from cascade.nets.cost import parameters
from cascade.runs.run import Run
from cascade.slurm.plan import Launcher, Task, TaskGroup
from cascade.training.rehearsal import batches, rehearsal_of

TIMED_STEPS = 3  # after one that is not counted
TIMED_BATCH = 32  # at most
LARGEST = 200_000_000  # parameters of a network that is timed on a CPU
HERE = "timed here"  # as a speed's source


@dataclass(frozen=True)
class Training:
    """A training that is not done.

    Attributes:
        seen: images that its folder's last checkpoint has seen.
    """

    task: Task
    config: DictConfig
    seen: int

    @property
    def left(self) -> int:
        return max(self.config.images - self.seen, 0)

    @property
    def kind(self) -> str:
        """What its cost per image depends on: trainings that differ in seed alone cost the same."""
        stage = OmegaConf.to_container(self.config.stage)
        own = {key: value for key, value in stage.items() if key not in ("seed", "encoders")}
        return json.dumps([own, OmegaConf.to_container(self.config.data.pictures)], sort_keys=True)


@dataclass(frozen=True)
class Speed:
    """Seconds for an image of a training of `flops` per image, and where that is from."""

    seconds: float
    flops: float
    source: str


@dataclass(frozen=True)
class Row:
    """A group of tasks: how many there are, and what is left.

    Attributes:
        begun: trainings that a checkpoint exists of, which are resumed.
        images: that are left to train on.
        gpus: of each task; None: the launcher leaves that to the machine.
        hours: of all tasks, one after another; None: not estimated.
        source: what the speed was measured by.
    """

    name: str
    tasks: int
    done: int
    running: int
    begun: int
    images: int
    gpus: int | None
    hours: float | None
    source: str


def estimated(groups: Sequence[TaskGroup], launcher: Launcher) -> list[Row]:
    """What each group of tasks still takes. Nothing is written or started."""
    folders = [task.folder for group in groups for task in group.tasks if not task.done]
    held = launcher.held(folders)
    return [_row(group, launcher, set(held)) for group in groups]


def _row(group: TaskGroup, launcher: Launcher, held: set[Path]) -> Row:
    left = [task for task in group.tasks if not task.done]
    trainings = [_training(task) for task in left if task.command[0] == "train"]
    ranks = launcher.ranks(group.resources)
    gpus = (1 if group.alone else math.prod(ranks.values())) if ranks else None
    counts = {
        "tasks": len(group.tasks),
        "done": len(group.tasks) - len(left),
        "running": sum(task.folder in held for task in left),
        "begun": sum(training.seen > 0 for training in trainings),
        "images": sum(training.left for training in trainings),
    }
    if not left:
        return Row(group.name, **counts, gpus=gpus, hours=0.0, source="")
    if trainings:
        seconds, source = _of_trainings(trainings, group.tasks, here=gpus is None)
    elif left[0].command[0] == "measure":
        seconds, source = _of_measurements(left, group.tasks)
    else:
        seconds, source = None, ""
    hours = None if seconds is None else seconds / 3600
    return Row(group.name, **counts, gpus=gpus, hours=hours, source=source)


def _training(task: Task) -> Training:
    config = OmegaConf.create(task.config)
    return Training(task, config, int(Run(task.folder).status().get("images", 0)))


def _of_trainings(
    trainings: Sequence[Training], tasks: Sequence[Task], here: bool
) -> tuple[float | None, str]:
    """Seconds of all that is left to train, and where the speed is from.

    Args:
        here: whether the trainings will run on this machine, so that one can be timed.
    """
    ran = [_training(task) for task in tasks if Run(task.folder).metrics()]
    by_kind = {training.kind: training for training in [*ran, *trainings]}
    rehearsals = {kind: rehearsal_of(one.config) for kind, one in by_kind.items()}
    flops = {kind: one.step().flops for kind, one in rehearsals.items()}
    speeds = list(_measured(ran, flops))
    if not speeds:
        smallest = min(trainings, key=lambda training: flops[training.kind])
        size = parameters(rehearsals[smallest.kind].module)
        if not (torch.cuda.is_available() or (here and size <= LARGEST)):
            return None, "no run to go by"
        speeds = [_timed(smallest, flops[smallest.kind])]
    seconds = 0.0
    for training in trainings:
        own = flops[training.kind]
        nearest = min(speeds, key=lambda speed: abs(speed.flops - own))
        seconds += training.left * nearest.seconds * own / nearest.flops
    return seconds, speeds[0].source + (f", and {len(speeds) - 1} more" if speeds[1:] else "")


def _measured(ran: Sequence[Training], flops: Mapping[str, float]) -> Iterator[Speed]:
    """Speeds of runs, one for each kind of training."""
    kinds = set()
    for training in ran:
        last = Run(training.task.folder).metrics()[-1]
        images, seconds = int(last["images"]), float(last["seconds"])
        if training.kind not in kinds and images and seconds:
            kinds.add(training.kind)
            name = training.task.folder.parent.name
            yield Speed(seconds / images, flops[training.kind], f"as {name}")


def _timed(training: Training, flops: float) -> Speed:
    """Times a few steps of a training on this machine, without data and frozen encoders."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = built(training.config.stage).to(device)
    count = min(training.config.batch, TIMED_BATCH)
    batch = _on(batches(training.config, module)(count), device)
    optimizer = module.optimizer(module.groups())
    # A CPU is shared with others, so its own time counts; on a GPU it would miss the work.
    clock = time.monotonic if device.type == "cuda" else time.process_time
    begin = 0.0
    for step in range(1 + TIMED_STEPS):
        if step == 1:
            begin = clock()
        module.training_step(batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return Speed((clock() - begin) / TIMED_STEPS / count / threads, flops, HERE)


def _on(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _of_measurements(left: Sequence[Task], tasks: Sequence[Task]) -> tuple[float | None, str]:
    """Seconds to sample the cells that are left, by those that were measured."""
    known = [cell for task in tasks for cell in Point(task.folder.parent).cells()]
    seconds = [cell["seconds"] for cell in known if cell.get("seconds")]
    if not seconds:
        return None, "no cell to go by"
    cells = sum(_cells(OmegaConf.create(task.config)) for task in left)
    return cells * sum(seconds) / len(seconds), f"mean of {len(seconds)} cells"


def _cells(config: DictConfig) -> int:
    count = 1
    for values in config.choices.values():
        count *= len(values)
    return count


def show(rows: Sequence[Row], price: float | None) -> None:
    """Print what would run.

    Args:
        price: of one hour of a GPU, or of this machine if no GPUs are asked for.
    """
    unit = "GPU-hours" if any(row.gpus for row in rows) else "hours"
    names = ("tasks", "done", "running", "begun", "images left", unit)
    table = Table("group", *names, *(["cost"] if price else []), "speed", title="would run")
    table.columns[0].no_wrap = True
    total = 0.0
    for row in rows:
        hours = None if row.hours is None else row.hours * (row.gpus or 1)
        total += hours or 0.0
        cost = [_figure(None if hours is None else hours * price)] if price else []
        counts = (row.tasks, row.done, row.running, row.begun, row.images)
        table.add_row(row.name, *(f"{n:,}" for n in counts), _figure(hours), *cost, row.source)
    Console().print(table)
    unknown = [row.name for row in rows if row.hours is None]
    lacking = f", and {', '.join(unknown)}, not estimated" if unknown else ""
    cost = f", {total * price:,.2f} at {price:g} an hour" if price else ""
    if any(row.source == HERE for row in rows):
        where = "GPU" if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
        print(f"{HERE}: {TIMED_STEPS} steps on this machine's {where}, without data and encoders")
    print(f"in all {total:,.2f} {unit}{cost}{lacking}; nothing was started")


def _figure(number: float | None) -> str:
    return "?" if number is None else f"{number:,.2f}"
