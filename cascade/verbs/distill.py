"""`cascade distill`: train a stage to sample in few steps, or resume it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cascade.config.compose import composed
from cascade.runs.run import Run
from cascade.training.distill import student
from cascade.training.fit import train


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Distil, or print the training's configuration; return the status and weights written."""
    config = student(composed("distill", args.overrides))
    if args.show:
        print(OmegaConf.to_yaml(config))
        return []
    run = Run(train(config))
    return [run.status_file, *run.weights]
