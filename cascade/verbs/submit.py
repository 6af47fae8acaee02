"""`cascade sweep`, `cascade launch`: submit a sweep, or a whole cascade as a chain of jobs."""

import argparse

from cascade.eval.sweeps.plan import submit_sweep
from cascade.slurm.chain import submit_cascade


def main(args: argparse.Namespace) -> None:
    {"sweep": submit_sweep, "launch": submit_cascade}[args.verb](args.overrides)
