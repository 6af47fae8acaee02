"""Throughput of the data pipeline on one core, compared to a typical one in the same process.

    python -m cascade.eval.benchmarks.data [PATH]

PATH is a folder of 512 px JPEG shards (default: a generated one). The typical pipeline streams with
webdataset, decodes in full resolution with PIL, then resizes, crops and normalizes with
torchvision. Rates are per second of CPU time, which other processes affect little; the pipelines
take turns, and the best round of each counts.
"""

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision import transforms as T

from cascade.config.compose import built, composed
from cascade.data.bsr import BSR
from cascade.data.embeddings import write_embeddings
from cascade.data.loading import collate, loader
from cascade.data.scenes.generate import write_scenes
from cascade.data.shards import Shards
from cascade.data.tars.dataset import DATASET
from cascade.data.tars.index import Index, save, scan
from cascade.data.tars.keys import PICTURES
from cascade.data.transforms import Pictures, decode
from cascade.draws import generator
from cascade.eval.benchmarks import clock


def typical(path: str, split: str, size: int, low: int | None) -> Iterable:
    """Yields (picture, small picture, caption) of each sample, as typical training scripts do."""
    transform = T.Compose(
        [
            T.Resize(size, T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    shrink = T.Resize(low, T.InterpolationMode.BICUBIC, antialias=True) if low else None

    def both(image: Image.Image) -> tuple[Tensor, Tensor | None]:
        x = transform(image)
        return x, shrink(x) if shrink else None

    urls = [str(tar) for tar in Shards(path, Pictures(()), split).corpus.paths]
    stream = wds.WebDataset(urls, shardshuffle=False).decode("pilrgb")
    return stream.to_tuple(";".join(PICTURES), "txt").map_tuple(both, str)


def natural_pictures(count: int, size: int = 512) -> list[bytes]:
    """JPEG files of about 50 KB at 512 px: noise with the power spectrum of photographs."""
    rng, files = np.random.default_rng(0), []
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1
    for _ in range(count):
        draws = rng.standard_normal((2, 3, *frequency.shape))
        x = np.fft.irfft2((draws[0] + 1j * draws[1]) / frequency**1.3, s=(size, size))
        grey = x[:1] + 0.35 * x
        pixels = (128 + 50 * (grey - grey.mean()) / grey.std()).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(file, "JPEG", quality=66)
        files.append(file.getvalue())
    return files


def write_shard(folder: Path, samples: int) -> None:
    """Writes a tar in img2dataset's format."""
    pictures = natural_pictures(32)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for i in range(samples):
            about = {"url": f"https://example.org/{i:064d}.jpg", "width": 512, "height": 512}
            members = {
                "jpg": pictures[i % len(pictures)],
                "txt": b"a photograph with a caption of the usual length",
                "json": json.dumps({**about, "key": f"{i:09d}", "status": "success"}).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def rates(path: str, split: str, images: int, rounds: int) -> list[tuple[str, float, float]]:
    """(name, our rate, the typical one) by kind of stage, in images per second and core."""
    return [
        ("64 px decoder", *_rates(path, split, Pictures((64,)), images, rounds)),
        ("64 to 256 px", *_rates(path, split, Pictures((64, 256), crop=64), images, rounds)),
    ]


def _rates(path: str, split: str, pictures: Pictures, images: int, rounds: int) -> list[float]:
    shards = Shards(path, pictures, split, shuffle=False)
    low = min(pictures.sizes) if len(pictures.sizes) > 1 else None
    stream, count = typical(path, split, pictures.largest, low), min(images, len(shards))
    runs = {
        "ours": lambda: [shards[n] for n in range(count)],
        "typical": lambda: list(islice(stream, count)),
    }
    return [count / seconds for seconds in clock.fastest(runs, rounds).values()]


def bsr_rate(files: list[bytes], rounds: int) -> float:
    """Pictures per second and core that BSR degrades from 256 to 64 px."""
    crops = [Pictures((256,))(f, generator(0, "crop", 0))["image_256"] for f in files]
    run = {"bsr": lambda: [BSR()(x, generator(0, "bsr", n)) for n, x in enumerate(crops)]}
    return len(crops) / clock.fastest(run, rounds)["bsr"]


def index_rate(path: str, split: str, folder: Path, rounds: int) -> float:
    """MB/s of indexing a tar in the page cache, including writing the index."""
    tar = Shards(path, Pictures(()), split).corpus.paths[0]
    run = {"index": lambda: save(replace(scan(tar), tar=folder / tar.name))}
    return tar.stat().st_size / 1e6 / clock.fastest(run, rounds)["index"]


def start_seconds(folder: Path, count: int = 10_000, samples: int = 10_000) -> float:
    """Wall time to open `count` shards of `samples` samples and the tars of the first batch.

    The tars are sparse files; only those of the first batch have a complete index.
    """
    found, spans = {}, np.arange(samples * 6, dtype=np.int64).reshape(samples, 3, 2) + 1
    names = np.frombuffer(b"".join(b"%09d" % i for i in range(samples)), np.uint8)
    ends = 9 * np.arange(1, samples + 1)
    for i in range(count):
        tar = folder / f"train-{i:05d}.tar"
        with open(tar, "wb") as file:
            file.truncate(500_000_000)
        stat = tar.stat()
        found[tar] = Index(tar, stat.st_size, stat.st_mtime_ns, names, ends, spans, {})
    summaries = {tar.name: vars(index.summary()) for tar, index in found.items()}
    (folder / DATASET).write_text(json.dumps({"tars": summaries}))
    batch = [next(Shards(folder, Pictures(())).order.places(n))[0] for n in range(256)]
    for n in set(batch):
        save(list(found.values())[n])
    start = time.perf_counter()
    shards = Shards(folder, Pictures(()))
    for n in range(256):
        tar, place = next(shards.order.places(n))
        shards.corpus[tar].key(place)
    return time.perf_counter() - start


def waiting(folder: Path, samples: int = 320) -> tuple[float, float]:
    """Milliseconds per batch and per step of the demo's decoder, without data workers.

    The batch time is averaged over a run: pictures are decoded in the first epoch and cached after.
    """
    demo = composed("demo", [])
    config = composed("train", [*demo.stages.decoder, f"data.path={folder}"])
    write_scenes(folder, demo.scenes.level, "train", samples, demo.scenes.size, seed=0)
    index, dim = scan(folder / "train-00000.tar"), config.clip.model.dim
    keys = [index.key(row) for row in range(samples)]
    rows = torch.nn.functional.normalize(torch.randn(samples, dim), dim=1)
    write_embeddings(folder / "embeddings", "train-00000", keys, {"clip_image": rows}, {})
    shards, batch = built(config.data), config.batch
    epochs = []
    for epoch in range(3):
        batches = iter(loader(shards, batch, start=epoch * samples, batches=samples // batch))
        read = {"batch": partial(next, batches)}
        times = clock.rounds(read, samples // batch, time.perf_counter)["batch"]
        epochs.append(sorted(times)[len(times) // 2])
    first = demo.scenes.counts.train / config.images  # the first epoch's share of the run
    module = built(config.stage)
    optimizer = module.optimizer(module.parameters())
    examples = module.encoded(collate([shards[n] for n in range(batch)]))

    def step() -> None:
        module.loss(examples).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = sorted(clock.rounds({"step": step}, 9, time.perf_counter)["step"])
    return 1000 * (first * epochs[0] + (1 - first) * min(epochs[1:])), 1000 * steps[4]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures; the error is taken to be at least half a level."""
    mse = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(mse, 0.25)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the data pipeline on one core.")
    parser.add_argument("path", nargs="?", help="folder of 512 px shards (default: generated)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=256, help="images per round (256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, help="ms of a training step (default: measured)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    try:
        for name in ("made", "index", "start", "demo"):
            (work / name).mkdir()
        if not args.path:
            write_shard(work / "made", 4 * args.images)
        print_table(args.path or str(work / "made"), work, args)
    finally:
        shutil.rmtree(work)


def print_table(path: str, work: Path, args: argparse.Namespace) -> None:
    opened = Shards(path, Pictures(()), args.split).corpus[0]
    files = [opened.read(n, "picture") for n in range(min(64, len(opened)))]
    table = Table("", "ours", "typical", "ratio", "target", title=f"{os.cpu_count()} cores, 1 used")
    targets = ("4", "1.5")
    for (what, ours, theirs), ratio in zip(
        rates(path, args.split, args.images, args.rounds), targets
    ):
        table.add_row(
            f"{what}, images/s", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}", ratio
        )
    table.add_row("BSR, 256 to 64 px, images/s", f"{bsr_rate(files, args.rounds):,.0f}")
    megabytes = index_rate(path, args.split, work / "index", args.rounds)
    table.add_row("index, MB/s", f"{megabytes:,.0f}", "", "", "300")
    seconds = start_seconds(work / "start")
    table.add_row("start with 10,000 shards, s", f"{seconds:.2f}", "", "", "< 5")
    batch, step = waiting(work / "demo")
    step = args.step or step
    share = 100 * batch / (batch + step)
    what = f"waiting, {batch:.1f} ms per batch and {step:.0f} ms per step, %"
    table.add_row(what, f"{share:.1f}", "", "", "< 2")
    pairs = ((decode(f, 64), decode(f, 64, scaled=False)) for f in files)
    mean = np.mean([psnr(*pair) for pair in pairs])
    kilobytes = np.mean([len(f) for f in files]) / 1000
    table.caption = f"files of {kilobytes:.0f} KB; scaled and full decoding differ: {mean:.1f} dB"
    Console().print(table)


if __name__ == "__main__":
    main()
