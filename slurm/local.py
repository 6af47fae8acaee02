"""The local launcher: tasks as processes of this machine, several at a time.

A failed task stops only the tasks that depend on it. A running task holds a lock on its folder, by
which a second launch and `cascade runs` detect it.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from cascade.errors import Failed, TryAgain, UserError
from cascade.files import processors
from cascade.runs.done import DONE, FAILURE, begin, finished
from cascade.slurm import queue
from cascade.slurm.code import digest_of, trusting
from cascade.slurm.plan import LOG, Submission, Task, TaskGroup
from cascade.slurm.queue import LOCK, Job
from cascade.slurm.state import screen, states, table, tail

_CHECKPOINTED = 75
_SPEAKS = 30.0  # seconds between two lines of a running task, where there is no terminal


@dataclass(frozen=True)
class Local:
    """Runs tasks on this machine and waits for them, in the order of their groups.

    Args:
        at_once: processes that run concurrently.
        gpus: GPUs to assign to processes round-robin; 0: every process sees all GPUs.
        python: the interpreter; None: the current one.
    """

    at_once: int
    gpus: int
    python: str | None

    def ranks(self, resources: Mapping[str, Any]) -> Mapping[str, int]:
        return {}

    def held(self, folders: Sequence[Path]) -> Mapping[Path, Job]:
        found = queue.known_jobs()
        mine = {folder: Job(None) for folder in folders if queue.locked(folder)}
        return {folder: found[folder] for folder in folders if folder in found} | mine

    def start(self, submission: Submission) -> None:
        """Run the remaining tasks.

        Raises:
            UserError: `at_once` is less than 1.
            Failed: tasks failed; the message names them and the groups that did not start.
            TryAgain: no task failed, but some stopped after a checkpoint.
        """
        if self.at_once < 1:
            raise UserError(f"launcher.at_once={self.at_once}: give at least 1")
        work = _Work(self, submission)
        folders = [task.folder for group in submission.groups for task in group.tasks]

        def shown() -> Table:
            return table(states(folders, {}, submission.root))

        # Updated in place on a terminal; elsewhere printed once, at the end, after lines of tasks.
        console, spoken = screen(stderr=True), time.monotonic()
        progress = Live(get_renderable=shown, console=console, refresh_per_second=1)
        with progress, _sigterm_as_interrupt():
            try:
                while work.step():
                    time.sleep(0.1)
                    if not console.is_terminal and time.monotonic() > spoken + _SPEAKS:
                        spoken = time.monotonic()
                        work.speak()
            finally:
                work.stop()
        if work.failed:
            waiting = ", ".join(work.waiting)
            stopped = f"; not started because of it: {waiting}" if waiting else ""
            raise Failed(f"{len(work.failed)} failed: {'; '.join(work.failed)}{stopped}")
        if work.stopped or work.waiting:
            names = ", ".join([*work.stopped, *work.waiting])
            raise TryAgain(f"not finished: {names}; run the same command to resume")


class _Work:
    """The processes of one launch."""

    def __init__(self, launcher: Local, submission: Submission):
        self.launcher, self.submission = launcher, submission
        self.groups = {group.name: group for group in submission.groups}
        self.before: dict[str, set[str]] = {}  # all that a group waits for
        for name, group in self.groups.items():
            self.before[name] = {*group.after}.union(*(self.before[one] for one in group.after))
        self.left = {name: list(submission.left[name]) for name in self.groups}
        self.running: dict[int, tuple[Task, subprocess.Popen]] = {}  # by slot
        self.finished: set[Path] = set()
        self.failed: list[str] = []
        self.stopped: list[str] = []

    @property
    def waiting(self) -> list[str]:
        return [name for name, tasks in self.left.items() if tasks]

    def step(self) -> bool:
        """Reap finished processes and start ready tasks; return False once nothing is running."""
        for slot, (task, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[slot]
                self._end(task, process.returncode)
        for slot in set(range(self.launcher.at_once)) - self.running.keys():
            if not (ready := self._next()):
                break
            self._begin(slot, *ready)
        return bool(self.running)

    def _next(self) -> tuple[TaskGroup, Task] | None:
        """Return the ready task that is next.

        First one that completes what an earlier task of a sweep began, so that results come early;
        then one that most groups wait for, so that none waits for long; else the first.
        """

        def place(group: TaskGroup) -> tuple[bool, int]:
            awaited = sum(group.name in before for before in self.before.values())
            return group.each_after is None, -awaited

        for group in sorted(self.groups.values(), key=place):
            name = group.name
            if all(self._is_done(*self.groups[earlier].tasks) for earlier in group.after):
                for task in self.left[name]:
                    if not group.each_after or self._is_done(self.submission.awaited(group, task)):
                        self.left[name].remove(task)
                        return group, task
        return None

    def _concurrent(self, group: TaskGroup) -> int:
        """Return how many tasks can run while one of a group does, itself included.

        It follows from the plan alone: the number of its threads may change a task's last bits.
        """
        groups = [
            one
            for name, one in self.groups.items()
            if name not in self.before[group.name] and group.name not in self.before[name]
        ]
        return min(self.launcher.at_once, sum(len(one.tasks) for one in groups))

    def _is_done(self, *tasks: Task) -> bool:
        return all(task.done or task.folder in self.finished for task in tasks)

    def _begin(self, slot: int, group: TaskGroup, task: Task) -> None:
        attempt = begin(task.folder)
        paths = [str(self.submission.code), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        # With an outer job's SLURM_* variables each process would consider itself a rank of srun.
        env = queue.outside_jobs() | processors.shared(os.environ, self._concurrent(group))
        env |= {"PYTHONPATH": path}
        env |= {"PYTHONSAFEPATH": "1", "CASCADE_FAILURE": str(task.folder / FAILURE)}
        env |= {"CASCADE_FOLDER": str(task.folder), "CASCADE_ATTEMPT": str(attempt)}
        if self.launcher.gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(slot % self.launcher.gpus)
        command = [self.launcher.python or sys.executable, "-m", "cascade"]
        command += ["--code", digest_of(self.submission.code), *trusting(), *task.command]
        with (task.folder / LOG).open("a") as log, (task.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # `stop` forwards Ctrl-C itself
                pass_fds=[lock.fileno()],  # held until the last child process exits
            )
        self.running[slot] = (task, process)
        print(f"{self._name(task)}: started", flush=True)

    def _end(self, task: Task, code: int) -> None:
        name = self._name(task)
        if code == 0 and finished(task.folder):
            self.finished.add(task.folder)
            print(f"{name}: finished", flush=True)
        elif code == _CHECKPOINTED:
            self.stopped.append(name)
            print(f"{name}: stopped after a checkpoint", flush=True)
        else:
            (task.folder / DONE).unlink(missing_ok=True)
            path = task.folder / FAILURE
            if not path.exists():
                unless = "" if code else ", but the task did not finish"
                path.write_text(f"exit code {code}{unless}\n")
            self.failed.append(f"{name} ({path.read_text().strip()}; see {task.folder / LOG})")
            print(f"{name}: failed ({path.read_text().strip()})", flush=True)

    def _name(self, task: Task) -> str:
        root = self.submission.root
        inside = task.folder != root and task.folder.is_relative_to(root)
        return str(task.folder.relative_to(root)) if inside else task.folder.name

    def speak(self) -> None:
        """Print the last line of each running task's log."""
        for task, _ in self.running.values():
            name, line = self._name(task), (tail(task.folder / LOG) or [""])[-1]
            if line:  # lines of progress name what they are of
                print(line if f" {name}: " in line else f"{name}: {line}", flush=True)

    def stop(self) -> None:
        """Ask running processes to checkpoint and exit; on a second interrupt, kill them."""
        number = signal.SIGTERM
        while alive := [p for _, p in self.running.values() if p.poll() is None]:
            for process in alive:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:  # a training ends its own loader workers
                    process.send_signal(number)
            try:
                for process in alive:
                    process.wait()
            except KeyboardInterrupt:
                number = signal.SIGKILL


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that terminating this process also ends its tasks."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
