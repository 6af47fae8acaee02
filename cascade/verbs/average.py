"""`cascade average`: make a run of another average of a run's weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cascade.config.compose import saved
from cascade.errors import UserError
from cascade.files.atomic import beside, check_writable, write_atomically
from cascade.runs.averages import averaged
from cascade.runs.run import Run


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Write a run with the averaged weights; return its status and weights."""
    run = Run(Path(args.run))
    out = Path(args.out) if args.out else beside(run.path, f"-{args.length:g}")
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or remove it")
    check_writable(out.parent, "choose another --out")
    module = run.load()
    averaged(module, run, args.length)
    origin = {"run": run.path.resolve().name, "length": args.length}
    config = OmegaConf.merge(run.config, {"run": str(out), "averaged": origin})
    status = run.status()

    def write(folder: Path) -> None:
        folder.mkdir()
        saved(config, Run(folder).config_file)
        module.export(folder)
        Run(folder).write_status(status.get("images", 0), status.get("total", 0))

    write_atomically(out, write)
    print(f"{out}: the average of length {args.length:g} of {run.path}")
    return [Run(out).status_file, *Run(out).weights]
