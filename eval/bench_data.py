"""How fast shards become training tensors on one core, against the usual pipeline in the same run.

`python -m cascade.eval.bench_data PATH [--size 64]` prints one table. The usual pipeline streams
with webdataset, decodes with PIL in full, then resizes, crops and normalizes with torchvision.
Times are CPU time, so that busy neighbours do not count. Rounds alternate; the best one counts.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import torch
import webdataset as wds
from rich.console import Console
from rich.table import Table
from torchvision import transforms as T

from cascade.data.bsr import BSR
from cascade.data.index import PICTURES, tars
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures, decode
from cascade.draws import generator


def usual(path: str, split: str, size: int) -> Iterable:
    """(picture, caption) of each sample, as most training scripts read it."""
    transform = T.Compose(
        [
            T.Resize(size, T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    urls = [str(tar) for tar in tars(path, split)]
    stream = wds.WebDataset(urls, shardshuffle=False).decode("pilrgb")
    return stream.to_tuple(";".join(PICTURES), "txt").map_tuple(transform, str)


def best_rates(runs: dict[str, Callable[[], object]], images: int, rounds: int) -> dict[str, float]:
    """Images per second of CPU time, the best of alternating rounds."""
    best = dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = max(best[name], images / (time.process_time() - start))
    return best


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of two uint8 pictures; equal ones differ by half a level."""
    mse = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(mse, 0.25)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second and core, of a folder.")
    parser.add_argument("path", help="folder of shards")
    parser.add_argument("--size", type=int, default=64, help="side of the target, pixels (64)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=512, help="images a round (512)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)

    shards = Shards(args.path, Pictures((args.size,)), args.split, shuffle=False)
    count = min(args.images, len(shards))
    files = [entry.read(entry.picture) for entry in shards.entries[:count]]
    stream = usual(args.path, args.split, args.size)
    crops = [Pictures((256,))(f, generator(0, "crop", 0))["image_256"] for f in files[:32]]
    rates = best_rates(
        {
            "usual: webdataset, PIL, torchvision": lambda: list(islice(stream, count)),
            "ours: Shards": lambda: [shards[n] for n in range(count)],
            "decode in full": lambda: [decode(f, args.size, scaled=False) for f in files],
            "decode scaled": lambda: [decode(f, args.size) for f in files],
            "BSR, 256 to 64 px": lambda: [
                BSR()(crops[n % len(crops)], generator(0, "degradation", n)) for n in range(count)
            ],
        },
        count,
        args.rounds,
    )
    first = next(iter(rates.values()))
    table = Table("", "images/s/core", "ratio", title=f"{count} images to {args.size} px")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / first:.2f}")
    pairs = ((decode(f, args.size), decode(f, args.size, scaled=False)) for f in files)
    table.caption = f"scaled against full: mean PSNR {np.mean([psnr(*p) for p in pairs]):.1f} dB"
    Console().print(table)


if __name__ == "__main__":
    main()
