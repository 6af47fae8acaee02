"""Throughput of feature extraction, compared to the network alone, and the time of a FID.

    python -m cascade.eval.benchmarks.evaluation [--pictures 256]

The network is Inception-v3 with random weights. The whole path takes 8-bit pictures from memory,
resizes them, extracts features, and accumulates mean and covariance. Both take turns, and the best
round of each counts: in CPU time on a CPU, which other processes affect little. The FID is computed
from moments, and includes factorizing both covariances.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cascade.eval.benchmarks import clock
from cascade.eval.metrics.features import InceptionFeatures, inception
from cascade.eval.metrics.interval import of_frechet
from cascade.eval.metrics.statistics import Moments, Origin

DISTINCT = 256  # different pictures, which are repeated
ROWS = 10_000  # features on each side of the FID


def extractor(device: torch.device) -> InceptionFeatures:
    """The feature space with random weights, loaded from a file like the published ones."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(inception().state_dict(), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return InceptionFeatures(path, sha256).to(device)


def rates(args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Pictures per second of the whole path, and of the network alone."""
    space = extractor(device)
    shape = (min(DISTINCT, args.pictures), 3, args.size, args.size)
    pictures = torch.randint(256, shape, dtype=torch.uint8)
    batches = [pictures.roll(i, 0)[: args.batch] for i in range(0, args.pictures, args.batch)]
    fed = torch.rand(args.batch, 3, 299, 299, device=device) * 2 - 1

    def whole(batches: Sequence[Tensor]) -> Tensor:
        moments = (Moments.of(space(batch.to(device)), Origin()) for batch in batches)
        return reduce(add, moments).mean.cpu()

    @torch.no_grad()
    def alone(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            space.net(fed[: len(batch)])

    for run in (whole, alone):  # warm up
        run(batches[:1])
    runs = {"whole": partial(whole, batches), "alone": partial(alone, batches)}
    on = clock.wall(device) if device.type == "cuda" else time.process_time
    best, count = clock.fastest(runs, args.rounds, on), len(batches) * args.batch
    return count / best["whole"], count / best["alone"]


def fid_seconds(rounds: int) -> tuple[float, float]:
    """CPU time of the distance between the moments of two sets, and of its interval."""
    scale = torch.logspace(0, -3, InceptionFeatures.dim, dtype=torch.float64)
    rows, others = (torch.randn(ROWS, len(scale), dtype=torch.float64) * scale for _ in range(2))
    one, other = (Moments.of(x, Origin()) for x in (rows, others))
    distance = {"seconds": lambda: one.frechet(other)}
    sure = {"seconds": lambda: of_frechet(rows, other.mean, other.cov)}
    return clock.fastest(distance, rounds)["seconds"], clock.fastest(sure, rounds)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of evaluation.")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=256, help="side in pixels (256)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole, alone = rates(args, device)
    title = f"{args.pictures:,} pictures of {args.size} px, {device}, {args.threads} threads"
    table = Table("", "measured", "target", title=title)
    table.add_row("network alone, pictures/s", f"{alone:,.1f}")
    table.add_row("pictures to moments, pictures/s", f"{whole:,.1f}")
    table.add_row("share of the network's rate, %", f"{100 * whole / alone:.1f}", "90")
    fid, sure = fid_seconds(args.rounds)
    table.add_row("FID in 2,048 dimensions, s of CPU time", f"{fid:.2f}", "< 5")
    table.add_row("its interval, s of CPU time", f"{sure:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
