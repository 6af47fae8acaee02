"""Which share of a job is this process's, where several do it without a word to each other."""

import argparse
import os
import shlex

from cascade.errors import UserError


def share(text: str | None) -> tuple[int, int]:
    """(i, n): this process does blocks i, i + n, ...

    Args:
        text: "i/n", with i from 0. None: what torchrun or Slurm's srun says, or else the whole: a
            batch script is one process, however many tasks its job has room for.

    Raises:
        UserError: the text is no such thing.
    """
    if text is None:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # Of a step that srun started: a batch script is told SLURM_PROCID and SLURM_NTASKS as well,
        # and one that was sent from within a step of another job has that step's numbers left.
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
        if tasks and tasks == os.environ.get("SLURM_NTASKS"):
            return int(os.environ["SLURM_PROCID"]), int(tasks)
        return 0, 1
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4")
    return int(i), int(n)


def whole(args: argparse.Namespace) -> str:
    """The same command for all shards: what is there it passes over."""
    return shlex.join(["cascade", *args.words, "--shard", "0/1"])
