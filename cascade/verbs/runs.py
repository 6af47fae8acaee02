"""`cascade runs`: show which runs are queued, running, preempted, finished or failed."""

import argparse
from pathlib import Path

from cascade.slurm.state import found_states, screen, table


def main(args: argparse.Namespace) -> None:
    states = found_states([Path(folder).absolute() for folder in args.folders])
    if states:
        screen().print(table(states))
    else:
        print("no runs yet")
