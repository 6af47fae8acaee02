"""Shards in an object store, against the same shards on this disk and against webdataset's pipes.

    python -m cascade.eval.benchmarks.store [--shards 4] [--samples 2048] [--rate 0]

A server on loopback (`bucket`) answers each request after a latency of 20 ms, and sends on each
connection as fast as it can, or at a given rate, as stores limit connections. Rates are of wall
time, on the processors that this process may use; server, helper and reader share them. A second
ratio is of the CPU time of all of them together, which other work on the machine affects less. The
ways take turns, each from an empty cache, and the best round of each counts.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from rich.console import Console
from rich.table import Table

from cascade.data.shards import Shards
from cascade.data.tars.dataset import DATASET, index_folder
from cascade.data.tars.index import Index, save
from cascade.data.transforms import Pictures
from cascade.eval.benchmarks import clock
from cascade.eval.benchmarks.bucket import MANY, SIZE
from cascade.eval.benchmarks.data import write_shard
from cascade.files.processors import lines_of
from cascade.files.stores.cache import PIECE, folder

Times = dict[str, tuple[float, float]]  # wall and CPU seconds, by name

REQUESTS = 16  # at a time, of the plain client that measures the server


@contextmanager
def bucket(files: Path, latency: float, rate: float) -> Iterator[int]:
    """Run the server; yields its port, at which obstore looks for s3://bucket."""
    command = [sys.executable, "-m", "cascade.eval.benchmarks.bucket", str(files)]
    command += [str(latency), str(rate)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    port = int(server.stdout.readline())
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_SKIP_SIGNATURE": "true"}
    try:
        yield port
    finally:
        server.stdin.close()
        server.wait(10)


def ceiling(port: int, names: list[str], size: int) -> None:
    """Fetch all files in pieces by plain sockets, and drop the bytes."""

    def fetch(part: tuple[str, int]) -> None:
        name, start = part
        asked = HTTPConnection("127.0.0.1", port)
        span = f"bytes={start}-{min(start + PIECE, size) - 1}"
        asked.request("GET", f"/bucket/files/{name}", headers={"Range": span})
        answer, into = asked.getresponse(), memoryview(bytearray(2**18))
        while answer.readinto(into):
            pass
        asked.close()

    parts = [(name, start) for name in names for start in range(0, size, PIECE)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(fetch, parts))


def emptied(run: Callable[[], object]) -> Callable[[], object]:
    """Return a run that begins with an empty cache."""

    def whole() -> object:
        for piece in folder().glob("*/*"):
            piece.unlink()
        return run()

    return whole


def read(path: str) -> Callable[[], object]:
    """Return a run that reads every picture and caption of the shards, and decodes nothing."""

    def run() -> None:
        shards, end = Shards(path, Pictures(()), block=2), 0
        for n in range(len(shards)):
            if n >= end:
                (_, end), tars = shards.order.ahead(n)
                shards.corpus.fetch_ahead(tars)
            tar, place = next(shards.order.places(n))
            for member in ("picture", "txt"):
                shards.corpus[tar].read(place, member)

    return run


def piped(port: int, names: list[str]) -> None:
    """Read every sample as webdataset does from a command."""
    urls = [f"pipe:curl -sf http://127.0.0.1:{port}/bucket/files/{name}" for name in names]
    for sample in wds.WebDataset(urls, shardshuffle=False):
        sample["jpg"], sample["txt"]


def decoded(path: str) -> Callable[[], object]:
    """Return a run of the 64 px decoder's pictures, in the order of a training."""

    def run() -> None:
        shards = Shards(path, Pictures((64,)), block=2)
        for n in range(len(shards)):
            shards[n]

    return run


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all that it started: server, helper, commands."""
    own, alive = os.times(), 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                alive += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own.user + own.system + own.children_user + own.children_system + alive


def helper_megabytes() -> float:
    """Return the peak memory of the process that speaks to the store, for all of a node."""
    peaks = [0]
    for process in Path("/proc").glob("[0-9]*"):
        if any("cascade.files.stores.server" in line for line in lines_of(f"{process}/cmdline")):
            status = "\n".join(lines_of(f"{process}/status"))
            peaks += map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))
    return max(peaks) / 1000


def timed(runs: clock.Runs, rounds: int) -> Times:
    """Return the wall and the CPU seconds of each way, in its best rounds."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, begun = time.perf_counter(), cpu_seconds()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(cpu_seconds() - begun)
    return {name: (min(wall[name]), min(cpu[name])) for name in runs}


def start_seconds(index: Path, samples: int = 10_000) -> float:
    """Seconds until the first batch of `MANY` shards in the store can be read; the index is here.

    Those of the first batch have a complete index.
    """
    spans = np.arange(samples * 6, dtype=np.int64).reshape(samples, 3, 2) + 1
    names = np.frombuffer(b"".join(b"%09d" % i for i in range(samples)), np.uint8)
    ends = 9 * np.arange(1, samples + 1)
    of = Index(Path("-"), SIZE, 10**18, names, ends, spans, {}, version='"1"')
    tars = {f"train-{n:05d}.tar": asdict(of.summary()) for n in range(MANY)}
    (index / DATASET).write_text(json.dumps({"tars": tars}))
    url, start = "s3://bucket/many", time.perf_counter()
    shards = Shards(url, Pictures(()), index=index, cache_gb=0)
    took = time.perf_counter() - start
    first = [next(shards.order.places(n)) for n in range(256)]
    for tar in {tar for tar, _ in first}:
        save(replace(of, tar=shards.corpus.paths[tar]), index)
    start = time.perf_counter()
    for tar, place in first:
        shards.corpus[tar].key(place)
    return took + time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Shards in a store, a disk and pipes.")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2048, help="of each shard, of about 50 KB")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds of each request")
    parser.add_argument("--rate", type=float, default=0.0, help="MB/s of each connection; 0: any")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    os.environ["CASCADE_CACHE"] = str(work / "cache")
    try:
        for name in ("files", "index"):
            (work / name).mkdir()
        with bucket(work / "files", args.latency, args.rate) as port:
            print_table(work, port, args)
    finally:
        shutil.rmtree(work)


def print_table(work: Path, port: int, args: argparse.Namespace) -> None:
    files = work / "files"
    write_shard(files, args.samples)
    first = files / "train-00000.tar"
    names = [f"train-{n:05d}.tar" for n in range(args.shards)]
    for name in names[1:]:
        shutil.copy(first, files / name)
    index_folder(files, lambda *_: None)
    size, here, there = first.stat().st_size, str(files), "s3://bucket/files"
    pictures = args.shards * args.samples
    images = timed({"disk": decoded(here), "store": emptied(decoded(there))}, args.rounds)
    reads = {
        "server": lambda: ceiling(port, names, size),
        "pipes": lambda: piped(port, names),
        "store": emptied(read(there)),
    }
    bytes_ = timed(reads, args.rounds)
    megabytes = args.shards * size / 1e6
    table = Table("", "store", "other", "ratio", "of CPU time", "target")

    def row(what: str, amount: float, times: Times, other: str, target: str) -> None:
        ours, theirs = times["store"], times[other]
        rates = (f"{amount / ours[0]:,.0f}", f"{amount / theirs[0]:,.0f}")
        ratios = (f"{theirs[i] / ours[i]:.2f}" for i in (0, 1))
        table.add_row(what, *rates, *ratios, target)

    row("64 px decoder, images/s, and from the disk", pictures, images, "disk", "0.9")
    for what, other, target in (("the server's own", "server", "0.8"), ("pipes", "pipes", "2")):
        row(f"undecoded, MB/s, and {what}", megabytes, bytes_, other, target)
    seconds = f"{start_seconds(work / 'index'):.2f}"
    table.add_row(f"start with {MANY:,} shards, s", seconds, "", "", "", "< 10")
    table.add_row("memory of the helper, MB", f"{helper_megabytes():.0f}", "", "", "", "< 300")
    used = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} processors"
    limit = f", {args.rate:g} MB/s for each connection" if args.rate else ""
    table.title = f"{1000 * args.latency:.0f} ms of latency{limit}, {used}"
    Console().print(table)


if __name__ == "__main__":
    main()
