"""The share of this process in a job that several processes do without communicating."""

import argparse
import os
import shlex

from cascade.errors import UserError


def share(text: str | None) -> tuple[int, int]:
    """(i, n): this process does blocks i, i + n, ...

    Args:
        text: "i/n", with i from 0. Default: the rank and number of ranks of torchrun or of Slurm's
            srun; 0/1 otherwise, in a batch script too, which is one process.

    Raises:
        UserError: the text has another form.
    """
    if text is None:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # Only srun sets SLURM_STEP_NUM_TASKS. Batch scripts have SLURM_PROCID and SLURM_NTASKS too,
        # and one submitted from within a step of another job inherits that step's variables; then
        # the two numbers differ.
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
        if tasks and tasks == os.environ.get("SLURM_NTASKS"):
            return int(os.environ["SLURM_PROCID"]), int(tasks)
        return 0, 1
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4")
    return int(i), int(n)


def whole(args: argparse.Namespace) -> str:
    """The same command for all shards; it skips what is complete."""
    return shlex.join(["cascade", *args.words, "--shard", "0/1"])
