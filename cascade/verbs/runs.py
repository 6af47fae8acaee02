"""`cascade runs`: what is queued, running, preempted, finished or failed, and how far it is."""

import argparse
from pathlib import Path

from cascade.errors import UserError
from cascade.slurm import queue, state


def main(args: argparse.Namespace) -> None:
    roots = [Path(folder).absolute() for folder in args.folders]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is no folder: give one with runs")
    jobs = queue.known_jobs()
    folders = {folder for root in roots for folder in state.runs(root)}
    folders |= {folder for folder in jobs for root in roots if folder.is_relative_to(root)}
    if not folders:
        print("no runs yet")
        return
    found = state.states(sorted(folders), jobs, Path.cwd())
    state.screen().print(state.table(found))
