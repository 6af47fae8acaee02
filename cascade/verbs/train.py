"""`cascade train`: train one stage, or resume it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cascade.config.compose import loaded
from cascade.errors import UserError
from cascade.files.process import is_first_rank
from cascade.runs.run import Run
from cascade.runs.start import training
from cascade.slurm.chain import LAUNCHER, split, submit_training
from cascade.training.fit import train


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Train, print the configuration, or submit a job; return the status and weights written."""
    own, overrides = split(args.overrides, [LAUNCHER])
    if args.config and args.overrides:
        raise UserError(f"--config {args.config} is complete: it takes no overrides")
    if own and args.show:
        raise UserError(f"--show prints the configuration of the training: omit {own[0]}")
    if own:
        submit_training(own, overrides)
        return []
    config = loaded(Path(args.config)) if args.config else training(overrides)
    if args.show:
        print(OmegaConf.to_yaml(config))
        return []
    folder = train(config)
    weights = Run(folder).weights
    if not weights and is_first_rank():
        raise UserError(
            f"{folder} has finished training, but its weights are gone: choose another run=..., "
            "or remove that folder to train again"
        )
    return [Run(folder).status_file, *weights]
