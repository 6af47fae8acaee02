"""How many processors this process may use, and so how many threads it should have.

A parallel loop of torch ends when the slowest of its threads arrives: with more threads than
processors each loop waits for one that has lost its own. How threads wait is left to OpenMP: that
they sleep at once (OMP_WAIT_POLICY=passive) cost more than it gained
(`python -m cascade.eval.benchmarks.busy`).

OpenMP reads its settings when torch is imported, so they must be in the environment before.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
COUNT = "OMP_NUM_THREADS"
COUNTS = (COUNT, "MKL_NUM_THREADS")


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which OpenMP's threads suit this process; those given are kept.

    The number of threads may change the order of sums; it is therefore chosen here, once, from what
    the process may use, and not from how busy the machine is.
    """
    whole = max(1, math.floor(available(environment)))
    if whole < _mask() and COUNT not in environment:
        return {COUNT: str(whole)}  # OpenMP itself would count the affinity mask alone
    return {}


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what `settings` added to it, for processes elsewhere."""
    rest = {name: value for name, value in environment.items() if name != COUNT}
    own = settings(rest)
    return {name: value for name, value in environment.items() if own.get(name) != value}


def shared(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return `settings` for each of some processes of this machine that run at the same time."""
    given = without(environment)
    each = max(1, math.floor(available(environment)) // processes)
    return settings(given) if COUNT in given else {**settings(given), COUNT: str(each)}


def available(environment: Mapping[str, str]) -> float:
    """Return the number of processors that this process may use.

    The least of its affinity mask, the limit of its cgroups, and what Slurm gave to its task.
    """
    return float(min(_mask(), quota(), _of_slurm(environment)))


def _mask() -> int:
    """Return the number of processors in the affinity mask; of all, where there are no masks."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota() -> float:
    """Return the number of processors that the strictest cgroup allows; infinity: no limit."""
    found = [math.inf]
    for line in lines_of("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _GROUPS / controllers
        inner = root / path.lstrip("/")
        for folder in [inner, *inner.parents]:
            found.append(limit(folder))
            if folder == root:
                break
    return min(found)


def limit(folder: Path) -> float:
    """Return the number of processors that one cgroup allows (versions 1 and 2)."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text() for name in names)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # "max", or no quota
        return math.inf


def _of_slurm(environment: Mapping[str, str]) -> float:
    """Return the processors of this task, if Slurm started it; on some clusters nothing else tells.

    Without --cpus-per-task, the tasks of a node share what the job has there.
    """
    if each := _whole(environment, "SLURM_CPUS_PER_TASK"):
        return float(each)
    if here := _whole(environment, "SLURM_CPUS_ON_NODE"):
        tasks = _whole(environment, "SLURM_NTASKS_PER_NODE")
        return here / (tasks or _whole(environment, "SLURM_STEP_TASKS_PER_NODE") or 1)
    return math.inf


def _whole(environment: Mapping[str, str], name: str) -> int:
    """Return a count that Slurm may follow by how often it is repeated, as in "4(x2)"; or 0."""
    count = re.match(r"\d+", environment.get(name, ""))
    return int(count[0]) if count else 0


def lines_of(path: str) -> list[str]:
    """Return the lines of one of Linux's files; none elsewhere."""
    try:
        return [line for line in Path(path).read_text().split("\n") if line]
    except OSError:
        return []
