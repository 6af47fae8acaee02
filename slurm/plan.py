"""What is to be run, before it is known where: tasks, and links of a chain of them.

A task's folder is its identity. What is finished is passed over and what is queued or running is
left alone, so that sending the same plan again goes on with what is missing.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.slurm.code import commit, copied
from cascade.slurm.queue import Job

FROZEN = "frozen.yaml"  # the configuration that a task's command reads
LOG = "log.txt"  # what a task prints, attempt after attempt


@dataclass(frozen=True)
class Task:
    """`python -m cascade {command}`, which keeps what it makes in `folder` (an absolute path).

    Args:
        config: written to `folder/frozen.yaml` when the task is sent; what is edited after that
            changes nothing.
        done: whether nothing is left to do.
    """

    folder: Path
    command: Sequence[str]
    config: str | None = None
    done: bool = False


@dataclass(frozen=True)
class Link:
    """Tasks that run side by side once all of the links named in `after` have ended well.

    Args:
        alone: each task is one process, not one for each GPU of each node.
        resources: values of the launcher's configuration that differ for this link.
        each_after: a link with as many tasks, of which each of these waits for its own alone.
    """

    name: str
    tasks: Sequence[Task]
    after: Sequence[str] = ()
    alone: bool = False
    resources: Mapping[str, Any] = field(default_factory=dict)
    each_after: str | None = None


@dataclass(frozen=True)
class Sent:
    """A plan that was written down: the tasks that are left, and where their code is.

    Args:
        root: what the plan as a whole is kept in.
        folder: of what is written down of this sending.
        code: what `PYTHONPATH` is for the tasks.
        links: with all of their tasks.
        left: what is neither done nor held by anyone, by link.
        held: who has which folder.
    """

    root: Path
    folder: Path
    code: Path
    links: Sequence[Link]
    left: Mapping[str, Sequence[Task]]
    held: Mapping[Path, Job]

    def awaited(self, link: Link, task: Task) -> Task:
        """The one of the link's `each_after` that this task of the link waits for."""
        earlier = next(one for one in self.links if one.name == link.each_after)
        return earlier.tasks[link.tasks.index(task)]

    def parts(self, link: Link, most: int | None) -> Iterator["Sent"]:
        """The same, with so many of a link's tasks at most, each with a record of its own."""
        tasks = self.left[link.name]
        most = most or len(tasks)
        if len(tasks) <= most:
            yield self
            return
        for i, first in enumerate(range(0, len(tasks), most)):
            left = {**self.left, link.name: tasks[first : first + most]}
            part = replace(self, folder=self.folder / f"part{i}", left=left)
            write_record(link, part)
            yield part

    def record(self, link: Link) -> Path:
        """The file that lists a link's tasks that are left, in order."""
        return self.folder / link.name / "tasks.json"


@runtime_checkable
class Launcher(Protocol):
    def ranks(self, resources: Mapping[str, Any]) -> Mapping[str, int]:
        """`devices` and `num_nodes` of a training; empty: it finds out for itself."""
        ...

    def held(self, folders: Sequence[Path]) -> Mapping[Path, Job]:
        """Who is at work in which of the folders, or waits to be."""
        ...

    def start(self, sent: Sent) -> None:
        """Starts what is left. Raises Failed or TryAgain if it sees that end, and not well."""
        ...


def launch(launcher: Launcher, root: Path, links: Sequence[Link]) -> None:
    """Freezes what is left of a plan under `root`, and starts it.

    Raises:
        UserError: two tasks share a folder, or one is held with another configuration.
    """
    root = root.absolute()
    tasks = [task for link in links for task in link.tasks]
    _apart([task.folder for task in tasks])
    held = launcher.held([task.folder for task in tasks if not task.done])
    for task in tasks:
        if not task.done and task.folder in held:
            _as_sent(task, held[task.folder])
    left = {
        link.name: [t for t in link.tasks if not t.done and t.folder not in held] for link in links
    }
    done, count = sum(task.done for task in tasks), sum(map(len, left.values()))
    parts = {"finished before": done, "queued or running": len(held), "to do": count}
    print(f"{root}: " + ", ".join(f"{n} {what}" for what, n in parts.items() if n))
    if not count:
        return
    folder = _numbered(root / "launch")
    sent = Sent(root, folder, copied(root / "launch"), links, left, held)
    for link in links:
        if left[link.name]:
            _write(link, sent)
    launcher.start(sent)


def _apart(folders: Sequence[Path]) -> None:
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(
                f"{folder} would be the directory of two: a directory is one run's identity, "
                "give each its own name"
            )


def _as_sent(task: Task, job: Job) -> None:
    before = task.folder / FROZEN
    if task.config is not None and before.exists() and before.read_text() != task.config:
        remedy = f"scancel {job.id}" if job.id else "stop that"
        raise UserError(
            f"{task.folder} is held by {job} with another configuration: {remedy} first, or "
            "choose another directory"
        )


def _numbered(folder: Path) -> Path:
    """A new folder with the next number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (folder / str(number)).mkdir()
            return folder / str(number)
        except FileExistsError:
            continue


def _write(link: Link, sent: Sent) -> None:
    for task in sent.left[link.name]:
        task.folder.mkdir(parents=True, exist_ok=True)
        if task.config is not None:
            text = task.config
            write_atomically(task.folder / FROZEN, lambda path, text=text: path.write_text(text))
    write_record(link, sent)


def write_record(link: Link, sent: Sent) -> None:
    """Writes which tasks of a link are sent, and with which code."""
    tasks = sent.left[link.name]
    record = {
        "time": round(time.time(), 3),
        "code": str(sent.code),
        **commit(),
        "tasks": [{"folder": str(t.folder), "command": list(t.command)} for t in tasks],
    }
    write_atomically(
        sent.record(link), lambda beside: beside.write_text(json.dumps(record, indent=1) + "\n")
    )
