"""Tasks as processes of this machine, several at a time.

What fails stops what hangs on it and nothing else. A task holds a lock on its folder while it runs,
so that a second launch, or `cascade runs`, sees that it does.
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

from cascade.done import DONE, FAILURE, begin, finished
from cascade.errors import Failed, TryAgain, UserError
from cascade.slurm import queue
from cascade.slurm.code import digest_of
from cascade.slurm.plan import LOG, Sent, Task
from cascade.slurm.queue import LOCK, Job
from cascade.slurm.state import screen, states, table

_CHECKPOINTED = 75


@dataclass(frozen=True)
class Local:
    """Runs tasks here and waits for them, in the order of their links.

    Args:
        at_once: processes at a time.
        gpus: GPUs that these share, one for each process in turn; 0: each process sees all.
        python: the interpreter, if it is not this one.
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

    def start(self, sent: Sent) -> None:
        """Runs what is left.

        Raises:
            UserError: nothing may run at a time.
            Failed: with what failed, and what was not started for that.
            TryAgain: some stopped behind a checkpoint, none failed.
        """
        if self.at_once < 1:
            raise UserError(f"launcher.at_once={self.at_once}: at least 1 runs at a time")
        work = _Work(self, sent)
        folders = [task.folder for link in sent.links for task in link.tasks]

        def shown() -> Table:
            return table(states(folders, {}, sent.root))

        # On a terminal it is kept up to date; elsewhere it is printed in the end.
        progress = Live(get_renderable=shown, console=screen(stderr=True), refresh_per_second=1)
        with progress, _terminated_as_interrupted():
            try:
                while work.step():
                    time.sleep(0.1)
            finally:
                work.stop()
        if work.failed:
            stopped = f"; not started for that: {', '.join(work.waiting)}" if work.waiting else ""
            raise Failed(f"{len(work.failed)} failed: {'; '.join(work.failed)}{stopped}")
        if work.stopped or work.waiting:
            names = ", ".join([*work.stopped, *work.waiting])
            raise TryAgain(f"not finished: {names}; the same command goes on")


class _Work:
    """The processes of a launch, from the first to the last."""

    def __init__(self, launcher: Local, sent: Sent):
        self.launcher, self.sent = launcher, sent
        self.left = {link.name: list(sent.left[link.name]) for link in sent.links}
        self.well = {  # links of which nothing is missing
            link.name for link in sent.links if all(task.done for task in link.tasks)
        }
        self.running: dict[int, tuple[str, Task, subprocess.Popen]] = {}  # by slot
        self.ended: set[Path] = set()
        self.failed: list[str] = []
        self.stopped: list[str] = []

    @property
    def waiting(self) -> list[str]:
        return [name for name, tasks in self.left.items() if tasks]

    def step(self) -> bool:
        """Sees what ended, and starts what can; False once nothing runs and nothing can."""
        for slot, (link, task, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[slot]
                self._end(link, task, process.returncode)
        for slot in set(range(self.launcher.at_once)) - self.running.keys():
            if not (ready := self._next()):
                break
            self._begin(slot, *ready)
        return bool(self.running)

    def _next(self) -> tuple[str, Task] | None:
        """What is nearest to the end of the chain: results come early."""
        for link in reversed(self.sent.links):
            if self.well.issuperset(link.after):
                for task in self.left[link.name]:
                    if link.each_after is None or self._is_well(self.sent.awaited(link, task)):
                        self.left[link.name].remove(task)
                        return link.name, task
        return None

    def _is_well(self, task: Task) -> bool:
        return task.done or task.folder in self.ended

    def _begin(self, slot: int, link: str, task: Task) -> None:
        attempt = begin(task.folder)
        threads = max(1, (os.cpu_count() or 1) // self.launcher.at_once)
        path = os.pathsep.join(filter(None, [str(self.sent.code), os.environ.get("PYTHONPATH")]))
        # A job's description would make each process one of srun's, with a share of the work.
        env = {"OMP_NUM_THREADS": str(threads), **queue.outside_jobs(), "PYTHONPATH": path}
        env |= {"PYTHONSAFEPATH": "1", "CASCADE_FAILURE": str(task.folder / FAILURE)}
        env |= {"CASCADE_FOLDER": str(task.folder), "CASCADE_ATTEMPT": str(attempt)}
        if self.launcher.gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(slot % self.launcher.gpus)
        command = [self.launcher.python or sys.executable, "-m", "cascade"]
        command += ["--code", digest_of(self.sent.code), *task.command]
        with (task.folder / LOG).open("a") as log, (task.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to pass on
                pass_fds=[lock.fileno()],  # held until the last of its processes is gone
            )
        self.running[slot] = (link, task, process)
        print(f"{self._name(task)}: started", flush=True)

    def _end(self, link: str, task: Task, code: int) -> None:
        name = self._name(task)
        if code == 0 and finished(task.folder):
            self.ended.add(task.folder)
            tasks = next(one.tasks for one in self.sent.links if one.name == link)
            if all(map(self._is_well, tasks)):
                self.well.add(link)
            print(f"{name}: finished", flush=True)
        elif code == _CHECKPOINTED:
            self.stopped.append(name)
            print(f"{name}: stopped behind a checkpoint", flush=True)
        else:
            (task.folder / DONE).unlink(missing_ok=True)
            path = task.folder / FAILURE
            if not path.exists():
                unless = "" if code else ", but it is not finished"
                path.write_text(f"exit code {code}{unless}\n")
            self.failed.append(f"{name} ({path.read_text().strip()}; see {task.folder / LOG})")
            print(f"{name}: failed ({path.read_text().strip()})", flush=True)

    def _name(self, task: Task) -> str:
        root = self.sent.root
        inside = task.folder != root and task.folder.is_relative_to(root)
        return str(task.folder.relative_to(root)) if inside else task.folder.name

    def stop(self) -> None:
        """Asks what still runs to write its checkpoint and end; asked twice, ends it."""
        number = signal.SIGTERM
        while alive := [p for _, _, p in self.running.values() if p.poll() is None]:
            for process in alive:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:  # its loaders' workers are for itself to end
                    process.send_signal(number)
            try:
                for process in alive:
                    process.wait()
            except KeyboardInterrupt:
                number = signal.SIGKILL


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is what Ctrl-C is: whoever ends this process ends all that it started."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
