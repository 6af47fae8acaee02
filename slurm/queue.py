"""Who is at work where: jobs of Slurm, and processes of this machine, by their folder.

A job's comment names the record of its sending, which lists the array's folders; so a job is found
even if whoever sent it died before its number was known.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cascade.errors import UserError
from cascade.texts import lines

_FIELDS = "JobArrayID:|,ArrayTaskID:|,State:|,RestartCnt:|,Reason:|,Comment:4096"
COMMENT = "cascade:"
_REACH = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE"}
LOCK = "lock"  # a process of this machine holds it while it is at work in a folder


@dataclass(frozen=True)
class Job:
    """Who is at work in a folder, or waits to be: one task of an array, or a process from here.

    Args:
        id: `{array}_{task}`, as scancel takes it; None for a process of this machine.
        state: Slurm's word, such as PENDING or RUNNING.
        restarts: how often it was requeued.
        reason: why it waits, in Slurm's word.
    """

    id: str | None
    state: str = "RUNNING"
    restarts: int = 0
    reason: str = "None"

    def __str__(self) -> str:
        return f"job {self.id}" if self.id else "a process of this machine"


def outside_jobs() -> dict[str, str]:
    """The environment without what Slurm's commands would take for options.

    Slurm describes a job to its processes in SLURM_* and SRUN_* variables, and a job that is sent
    from there inherits them: memory of the outer job that contradicts that of the new one, tasks
    that are not there. SQUEUE_* and the like would hide jobs. What only tells the commands how to
    reach Slurm, and is never a job's, is kept.
    """
    return {
        key: value
        for key, value in os.environ.items()
        if key in _REACH or not key.startswith(("SLURM_", "SRUN_", "SQUEUE_", "SCONTROL_"))
    }


def slurm(*command: str, env: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands prints. Raises UserError with its last line if it fails.

    Args:
        env: the command's environment; None: `outside_jobs()`.
    """
    env = outside_jobs() if env is None else env
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine: launch on a login node of a Slurm cluster, or "
            "choose launcher=local"
        ) from None
    if done.returncode:
        said = lines(done.stderr.strip()) or [f"exit code {done.returncode}"]
        raise UserError(f"{command[0]}: {said[-1].removeprefix(f'{command[0]}: ')}")
    return done.stdout


def jobs() -> Mapping[Path, Job]:
    """The jobs of this user that wait or run, by folder."""
    found = {}
    tasks = cache(_tasks)
    listed = slurm("squeue", "--me", "--array", "--noheader", f"--Format={_FIELDS}")
    for line in lines(listed):
        id, index, state, restarts, reason, comment = line.split("|", 5)
        if reason == "DependencyNeverSatisfied":
            continue  # Slurm is about to cancel it
        if comment.startswith(COMMENT) and index.isdigit():
            folders = tasks(Path(comment.strip().removeprefix(COMMENT)))
            if int(index) < len(folders):
                found[folders[int(index)]] = Job(id, state, int(restarts), reason)
    return found


def known_jobs() -> Mapping[Path, Job]:
    """The same where Slurm answers; none elsewhere, and it says so if Slurm should be there."""
    if not shutil.which("squeue"):
        return {}
    try:
        return jobs()
    except UserError as error:
        print(f"{error}; what Slurm has is not known", file=sys.stderr)
        return {}


def _tasks(record: Path) -> list[Path]:
    try:
        return [Path(task["folder"]) for task in json.loads(record.read_text())["tasks"]]
    except (OSError, ValueError, KeyError):
        return []  # somebody removed it: nothing is known of the job any more


def locked(folder: Path) -> bool:
    """Whether a process of this machine is at work in a folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # never launched here
    return False
