"""What measuring a point of a sweep takes, compared with an earlier build.

    python -m cascade.eval.benchmarks.points --model runs/demo --before OTHER/.venv/bin/cascade
        --axis decoder.scale=1,2,4 --axis sr64.level=0,0.1,0.2 [--last sr64] [--count 30]

Both builds measure the model of a demo at all cells of a grid of sampling choices, one build after
the other, from the start of the process. The numbers of the cells are compared as well. The
project's sweeps on scenes judge at 64 px, as `--last sr64` does.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from cascade.errors import UserError
from cascade.eval.benchmarks.demo import OWN, took
from cascade.eval.sweeps.folder import Point
from cascade.runs.cascade_file import CASCADE, stage_choices, stage_runs

TIMED = ("seconds",)  # numbers of a cell that differ from run to run


def axes(asked: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The choices of a grid, from arguments such as "decoder.scale=1,2,4".

    Raises:
        UserError: an argument has another form.
    """
    found = {}
    for one in asked:
        name, _, values = one.partition("=")
        if "." not in name or not all(values.split(",")):
            raise UserError(f"--axis {one}: not STAGE.OPTION=VALUE,VALUE,...")
        found[name] = {value: [f"{name}={value}"] for value in values.split(",")}
    return found


def point(
    folder: Path, model: Path, choices: Mapping[str, Any], count: int, last: str | None = None
) -> Path:
    """Write a point of a sweep that samples from a demo's runs; returns the file of its grid.

    Args:
        last: the last stage that paints; None: that of the demo.

    Raises:
        UserError: the demo has no stage `last`.
    """
    file = model / CASCADE
    stages = {
        name: {**(of or {}), "run": str(run.absolute())}
        for (name, of), run in zip(stage_choices(file, ()).items(), stage_runs(file).values())
    }
    names = list(stages)
    if last and last not in names:
        raise UserError(f"--last {last}: the stages are {', '.join(names)}")
    end = names.index(last) + 1 if last else len(names)
    kept = {name: stages[name] for name in names[:end]}
    folder.mkdir(parents=True)
    (folder / CASCADE).write_text(OmegaConf.to_yaml({"stages": kept}))
    about = {"model": folder, "data": model / "shards", "judge": model / "judge"}
    asked = {key: str(path.absolute()) for key, path in about.items()}
    asked |= {"point": {}, "seed": 0, "choices": choices, "trained": None}
    asked |= {"split": "val", "count": count}
    out = folder / "grid.yaml"
    out.write_text(OmegaConf.to_yaml(asked))
    return out


def measured(program: Path, file: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What a build took to measure a point (`demo.took`), and the cells that it wrote."""
    spent = took([program, "cells", file])  # the verb's first name, which every build knows
    return spent, Point(file.parent).cells()


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of the numbers that two cells share, relative to their size."""
    worst = 0.0
    for key in (one.keys() & other.keys()) - set(TIMED):
        a, b = one[key], other[key]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            worst = max(worst, difference(a, b))
        elif isinstance(a, int | float) and isinstance(b, int | float):
            worst = max(worst, abs(a - b) / max(abs(a), abs(b), 1e-9))
    return worst


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a demo")
    parser.add_argument("--before", type=Path, required=True, help="the other build's `cascade`")
    parser.add_argument("--axis", action="append", required=True, help="STAGE.OPTION=VALUE,...")
    parser.add_argument("--last", help="the last stage that paints; default: that of the demo")
    parser.add_argument("--count", type=int, default=30, help="captions of each kind")
    args = parser.parse_args(argv)
    choices = axes(args.axis)
    of = (args.model, choices, args.count, args.last)
    with tempfile.TemporaryDirectory() as folder:
        (before, old), (now, new) = (
            measured(program, point(Path(folder) / name, *of))
            for name, program in (("before", args.before.absolute()), ("now", OWN))
        )
    cells = math.prod(len(values) for values in choices.values())
    out = Table("", "before", "now", "ratio", title=f"{cells} cells, {args.count} of each kind")
    for key, unit in {"wall": "s", "cpu": "s", "memory": "MiB"}.items():
        a, b = before[key], now[key]
        out.add_row(key, f"{a:,.1f} {unit}", f"{b:,.1f} {unit}", f"{b / a:.2f}")
    Console().print(out)
    by_choice = {json.dumps(row["choices"]): row for row in old}
    worst = max(difference(row, by_choice[json.dumps(row["choices"])]) for row in new)
    Console().print(f"largest relative difference of the cells' numbers: {worst:.1e}")


if __name__ == "__main__":
    main()
