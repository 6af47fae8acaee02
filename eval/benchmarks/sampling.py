"""Sampling's start and cost, compared with an earlier build's, and with distilled stages.

    python -m cascade.eval.benchmarks.sampling --model runs/demo [--before OTHER/.venv/bin/cascade]
        [--fast runs/demo/fast.yaml] [--rounds 3]

Cold: `cascade sample` of one caption, from the start of its process to the file; builds take turns,
and the median counts. Warm: pictures of one batch in a loaded cascade, with the number of network
evaluations for each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from cascade.eval.benchmarks.demo import OWN, took
from cascade.eval.sweeps.points import counted
from cascade.runs.model import load_cascade, paint

CAPTION = "a red circle above a blue square"
WARM = 8  # pictures


def cold(builds: dict[str, Path], model: Path, rounds: int) -> Table:
    """Seconds of each build, the ratio, and whether they paint the same pixels."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.png" for name in builds}
        for _ in range(rounds):
            for name, program in builds.items():
                files[name].unlink(missing_ok=True)
                command = [program, "sample", "--model", model, CAPTION, "--out", files[name]]
                times[name].append(took(command))
        pictures = [np.asarray(Image.open(file, formats=["PNG"])) for file in files.values()]
    out = Table("cold, one caption", *builds, "ratio")
    for key, unit in {"wall": "s", "cpu": "s", "memory": "MiB"}.items():
        medians = [statistics.median(one[key] for one in some) for some in times.values()]
        ratio = f"{medians[-1] / medians[0]:.2f}"
        out.add_row(key, *(f"{value:,.1f} {unit}" for value in medians), ratio)
    same = all(np.array_equal(pictures[0], other) for other in pictures)
    out.add_row("same pixels", *[""] * len(builds), "yes" if same else "no")
    return out


def warm(models: dict[str, Path]) -> Table:
    """Network evaluations and seconds for a picture, by stage."""
    out = Table("warm", "model", "stage", "evaluations", "seconds a picture")
    for name, model in models.items():
        cascade, given, sums = load_cascade(model), {}, [0.0, 0.0]
        for link in cascade.stages:
            alone = type(cascade)([link])
            with counted(link) as calls:
                begin = time.perf_counter()
                made = paint(alone, [CAPTION] * WARM, seed=0, given=given, what=link.writes)
                seconds = (time.perf_counter() - begin) / WARM
            given[link.writes] = made[link.writes]
            evaluations = sum(calls) / WARM
            out.add_row("", name, link.writes, f"{evaluations:g}", f"{seconds:.3f}")
            sums = [sums[0] + evaluations, sums[1] + seconds]
        out.add_row("", name, "all", f"{sums[0]:g}", f"{sums[1]:.3f}")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="an earlier build's `cascade`")
    parser.add_argument("--fast", type=Path, help="a cascade file with distilled stages")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    builds = {"before": args.before.absolute()} if args.before else {}
    models = {"as trained": args.model} | ({"fast": args.fast} if args.fast else {})
    Console().print(cold(builds | {"now": OWN}, args.model, args.rounds))
    Console().print(warm(models))


if __name__ == "__main__":
    main()
