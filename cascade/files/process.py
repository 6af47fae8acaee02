"""Which process this is: its launcher's attempt, and its rank."""

import os


def attempt() -> int | None:
    """The number of this process's attempt; None if no launcher started it."""
    return int(os.environ.get("CASCADE_ATTEMPT") or 0) or None


def is_first_rank() -> bool:
    """Whether this is the first of the processes that srun, torchrun or Lightning started."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)
