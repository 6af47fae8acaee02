"""`cascade sweep`: one training at each point of a grid, all side by side.

A point's directory, named by its place in the grid, is its identity: the same command again goes
on with what is not finished.
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from cascade.slurm.plan import Link, launch
from cascade.verbs.configuration import built, composed
from cascade.verbs.sending import LAUNCHER, split, training

_OWN = ("sweep", LAUNCHER, "run", "base", "axes")


def main(args: argparse.Namespace) -> None:
    own, overrides = split(args.overrides, _OWN)
    config = composed("sweep", own)
    root, launcher = Path(config.run), built(config.launcher)
    tasks = []
    for name, point in points(OmegaConf.to_container(config.axes)):
        at = [f"run={root / name}"]
        task, _ = training(joined(config.base, overrides, point, at), launcher)
        tasks.append(task)
    launch(launcher, root, [Link("sweep", tasks)])


def points(
    axes: Mapping[str, Mapping[str, Sequence[str]]],
) -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of each point: of each axis one value, in the order of the axes."""
    for values in itertools.product(*(axis.items() for axis in axes.values())):
        yield "-".join(name for name, _ in values), [o for _, own in values for o in own]


def joined(*parts: Sequence[str]) -> list[str]:
    """Overrides one behind the other; the last of several for one key is the one that counts."""
    return list({o.partition("=")[0].lstrip("+"): o for part in parts for o in part}.values())
