"""`cascade measure`: measure one point of a sweep at every cell."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.eval.sweeps.points import measure_point


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Return the file of the point's cells."""
    cells = measure_point(Path(args.file)).cells_file
    print(cells)
    return [cells]
