"""A plan of what to run, independent of where it runs: tasks, and groups of tasks in a chain.

A task's folder is its identity. Finished tasks are skipped, and queued or running tasks are left
alone, so submitting the same plan again runs only the tasks that are missing.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cascade.errors import UserError
from cascade.files.atomic import write_text
from cascade.runs.done import FROZEN
from cascade.slurm.code import commit, copied
from cascade.slurm.queue import Job

LOG = "log.txt"  # a task's output; every attempt appends to it


@dataclass(frozen=True)
class Task:
    """One run of `python -m cascade {command}`, which writes to `folder` (an absolute path).

    Args:
        config: written to `folder/frozen.yaml` on submission, so later edits have no effect.
        done: whether the task is already finished.
    """

    folder: Path
    command: Sequence[str]
    config: str | None = None
    done: bool = False


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that may run concurrently once all groups named in `after` have succeeded.

    Args:
        alone: run each task as a single process instead of one per GPU of each node.
        resources: values that override the launcher's configuration for this group.
        each_after: the name of a group with equally many tasks; task i of this group waits only
            for task i of that one.
    """

    name: str
    tasks: Sequence[Task]
    after: Sequence[str] = ()
    alone: bool = False
    resources: Mapping[str, Any] = field(default_factory=dict)
    each_after: str | None = None


@dataclass(frozen=True)
class Submission:
    """A plan as submitted: the tasks that remain, and the frozen code that they run.

    Args:
        root: directory of the plan as a whole.
        folder: directory of this submission's records and scripts.
        code: the tasks' `PYTHONPATH`.
        groups: all groups, with all of their tasks.
        left: the tasks that are neither done nor held by a job, by group.
        held: the job that holds each folder.
    """

    root: Path
    folder: Path
    code: Path
    groups: Sequence[TaskGroup]
    left: Mapping[str, Sequence[Task]]
    held: Mapping[Path, Job]

    def awaited(self, group: TaskGroup, task: Task) -> Task:
        """Return the task of `group.each_after` that this task of `group` waits for."""
        earlier = next(one for one in self.groups if one.name == group.each_after)
        return earlier.tasks[group.tasks.index(task)]

    def parts(self, group: TaskGroup, most: int | None) -> Iterator["Submission"]:
        """Split a group into submissions of at most `most` tasks, each with its own record."""
        tasks = self.left[group.name]
        if most is None or len(tasks) <= most:
            yield self
            return
        for i, first in enumerate(range(0, len(tasks), most)):
            left = {**self.left, group.name: tasks[first : first + most]}
            part = replace(self, folder=self.folder / f"part{i}", left=left)
            write_record(group, part)
            yield part

    def record(self, group: TaskGroup) -> Path:
        """Return the path of the file that lists a group's remaining tasks, in order."""
        return self.folder / group.name / "tasks.json"


@runtime_checkable
class Launcher(Protocol):
    def ranks(self, resources: Mapping[str, Any]) -> Mapping[str, int]:
        """Return a training's `devices` and `num_nodes`; empty if it detects them itself."""

    def held(self, folders: Sequence[Path]) -> Mapping[Path, Job]:
        """Return the running or queued job of each folder that has one."""

    def start(self, submission: Submission) -> None:
        """Start the remaining tasks. A launcher that waits raises Failed or TryAgain."""


def launch(launcher: Launcher, root: Path, groups: Sequence[TaskGroup]) -> None:
    """Freeze the remaining tasks of a plan under `root`, and start them.

    Raises:
        UserError: two tasks share a folder, or a job holds a folder with another configuration.
    """
    root = root.absolute()
    tasks = [task for group in groups for task in group.tasks]
    _check_distinct([task.folder for task in tasks])
    held = launcher.held([task.folder for task in tasks if not task.done])
    for task in tasks:
        if not task.done and task.folder in held:
            _check_same_config(task, held[task.folder])
    left = {
        group.name: [t for t in group.tasks if not t.done and t.folder not in held]
        for group in groups
    }
    done, count = sum(task.done for task in tasks), sum(map(len, left.values()))
    parts = {"already finished": done, "queued or running": len(held), "to do": count}
    print(f"{root}: " + ", ".join(f"{n} {what}" for what, n in parts.items() if n))
    if not count:
        return
    # Numbered, so that records of earlier submissions stay readable for jobs still in the queue.
    folder = _numbered(root / "launch")
    submission = Submission(root, folder, copied(root / "launch"), groups, left, held)
    for group in groups:
        if left[group.name]:
            _freeze(group, submission)
    launcher.start(submission)


def _check_distinct(folders: Sequence[Path]) -> None:
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(
                f"{folder} would be the directory of two tasks: a directory identifies one run, so "
                "give each task its own"
            )


def _check_same_config(task: Task, job: Job) -> None:
    before = task.folder / FROZEN
    if task.config is not None and before.exists() and before.read_text() != task.config:
        remedy = f"run `scancel {job.id}`" if job.id else "stop it"
        raise UserError(
            f"{task.folder} is in use by {job} with another configuration: {remedy} first, or "
            "choose another directory"
        )


def _numbered(folder: Path) -> Path:
    """Create and return a subfolder with the next free number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (folder / str(number)).mkdir()
            return folder / str(number)
        except FileExistsError:
            continue


def _freeze(group: TaskGroup, submission: Submission) -> None:
    for task in submission.left[group.name]:
        task.folder.mkdir(parents=True, exist_ok=True)
        if task.config is not None:
            write_text(task.folder / FROZEN, task.config)
    write_record(group, submission)


def write_record(group: TaskGroup, submission: Submission) -> None:
    """Write which tasks of a group are submitted, and with which code."""
    tasks = submission.left[group.name]
    record = {
        "time": round(time.time(), 3),
        "code": str(submission.code),
        **commit(),
        "tasks": [{"folder": str(t.folder), "command": list(t.command)} for t in tasks],
    }
    write_text(submission.record(group), json.dumps(record, indent=1) + "\n")
