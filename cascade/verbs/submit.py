"""`cascade sweep`, `cascade launch`: submit a sweep, or a whole cascade as a chain of jobs."""

import argparse

from cascade.errors import UserError
from cascade.eval.sweeps.plan import planned_sweep, submit_sweep
from cascade.slurm.chain import submit_cascade


def main(args: argparse.Namespace) -> None:
    if args.verb == "sweep" and args.dry_run:
        from cascade.eval.sweeps.estimate import estimated, show

        if args.price is not None and not 0 < args.price < float("inf"):
            raise UserError(f"--price {args.price}: give a number above 0")
        return show(estimated(*planned_sweep(args.overrides)), args.price)
    {"sweep": submit_sweep, "launch": submit_cascade}[args.verb](args.overrides)
