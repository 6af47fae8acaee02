"""Jobs of Slurm and processes of this machine, found by the folder that they work in.

A job's comment names the record of its submission, which lists the folders of the array. A job is
thus found even if the submitting process died before it learned the job's number.
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
from cascade.files import processors
from cascade.formats.texts import lines

_FIELDS = "JobArrayID:|,ArrayTaskID:|,State:|,RestartCnt:|,Reason:|,Comment:4096"
COMMENT = "cascade:"
_REACH = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE"}
LOCK = "lock"  # held by a process of this machine while it works in a folder


@dataclass(frozen=True)
class Job:
    """What works in a folder, or waits to: one task of a job array, or a local process.

    Args:
        id: `{array}_{task}`, as for scancel; None for a process of this machine.
        state: Slurm's job state, such as PENDING or RUNNING.
        restarts: how often the task was requeued.
        reason: Slurm's reason for a pending job.
    """

    id: str | None
    state: str = "RUNNING"
    restarts: int = 0
    reason: str = "None"

    def __str__(self) -> str:
        return f"job {self.id}" if self.id else "a process of this machine"


def outside_jobs() -> dict[str, str]:
    """Return the environment without variables that Slurm's commands would read as options.

    Slurm describes a job to its processes in SLURM_* and SRUN_* variables. A job submitted from
    inside another would inherit them, for instance a memory request that contradicts its own.
    SQUEUE_* and SCONTROL_* variables would hide jobs. Variables that only tell the commands how to
    reach Slurm are kept. What this process chose for its own threads is none of a job's business.
    """
    return {
        key: value
        for key, value in processors.without(os.environ).items()
        if key in _REACH or not key.startswith(("SLURM_", "SRUN_", "SQUEUE_", "SCONTROL_"))
    }


def slurm(*command: str, env: Mapping[str, str] | None = None) -> str:
    """Return the output of a Slurm command; raise UserError with its last line if it fails.

    Args:
        env: the command's environment; None: `outside_jobs()`.
    """
    env = outside_jobs() if env is None else env
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine: run this on a login node of a Slurm cluster, or "
            "choose launcher=local"
        ) from None
    if done.returncode:
        errors = lines(done.stderr.strip()) or [f"exit code {done.returncode}"]
        raise UserError(f"{command[0]}: {errors[-1].removeprefix(f'{command[0]}: ')}")
    return done.stdout


def jobs() -> Mapping[Path, Job]:
    """Return this user's pending and running jobs, by folder."""
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
    """Return `jobs()`, or nothing without Slurm; warn if Slurm is installed but fails."""
    if not shutil.which("squeue"):
        return {}
    try:
        return jobs()
    except UserError as error:
        print(f"{error}; the jobs in Slurm's queue are unknown", file=sys.stderr)
        return {}


def _tasks(record: Path) -> list[Path]:
    try:
        return [Path(task["folder"]) for task in json.loads(record.read_text())["tasks"]]
    except (OSError, ValueError, KeyError):
        return []  # the record was removed, so the job cannot be attributed


def locked(folder: Path) -> bool:
    """Return whether a process of this machine works in a folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # nothing was ever launched in it
    return False
