"""A world of 4,096 ranks with 16 data workers each, over 100,000 shards, driven rank by rank.

The shards are links to a few, so that only names are many. Nothing here measures time: what a start
does is counted instead.
"""

import json
import os
import resource
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest

from cascade.config.checks import accumulation
from cascade.data import loading
from cascade.data.loading import loader
from cascade.data.order import Order, sample_numbers
from cascade.data.shards import Shards
from cascade.data.tars import corpus
from cascade.data.tars.dataset import DATASET, index_folder
from cascade.data.transforms import Pictures
from cascade.runs.run import Position
from tests import small
from tests.processes import Job
from tests.test_ranks import recorded
from tests.test_shards import sample, write

WORLD, WORKERS, SHARDS = 4096, 16, 100_000
DISTINCT, EACH = 10, 8  # tars, and samples in each
BATCH = 2  # of a rank
SOME = (0, 1, 777, WORLD // 2, WORLD - 2, WORLD - 1)


def test_all_ranks_together_take_the_samples_of_one_in_its_order():
    """Of all 4,096, and after a step with another number of ranks and micro-batches."""
    step, batch, at = 3, WORLD * BATCH, 0
    for world, micro in ((WORLD, None), (1024, 4), (WORLD, 1), (2048, 1), (1, BATCH)):
        share, times = accumulation(batch, micro, world)
        start = Position(step, batch, offset=5).consumed
        assert share * times * world == batch
        ranks = [sample_numbers(share, r, world, start, times) for r in range(world)]
        taken = [n for parts in zip(*ranks) for n in chain.from_iterable(parts)]
        assert taken == list(range(start, start + batch))
        assert at in (0, start)
        step, at = step + 1, start + batch


def test_the_order_of_a_hundred_thousand_shards_is_computed_a_block_at_a_time():
    order = Order([EACH] * SHARDS, seed=0, block=64, shuffle=True)
    first = [next(order.places(n)) for n in range(2 * WORLD)]
    assert len(set(first)) == len(first)
    assert len({tar for tar, _ in first}) <= 64 * -(-len(first) // (64 * EACH))
    for n in (0, 511, 512, 2 * WORLD - 1):  # alone, as a rank asks for it
        assert next(Order([EACH] * SHARDS, 0, 64, True).places(n)) == first[n]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An indexed folder of 100,000 shards."""
    folder = tmp_path_factory.mktemp("scale")
    for t in range(DISTINCT):
        members = [m for i in range(EACH) for m in sample(f"{i:04d}", t)]
        write(folder / f"base-{t}.tar", members)
    dataset, _ = index_folder(folder, lambda *_: None)
    about = json.loads((folder / DATASET).read_text())
    base = list(about["tars"].values())
    assert len(dataset.tars) == DISTINCT
    for end in (".tar", ".index"):
        for n in range(SHARDS):
            os.link(folder / f"base-{n % DISTINCT}{end}", folder / f"{n:06d}{end}")
        for t in range(DISTINCT):
            (folder / f"base-{t}{end}").unlink()
    about["tars"] = {f"{n:06d}.tar": base[n % DISTINCT] for n in range(SHARDS)}
    (folder / DATASET).write_text(json.dumps(about))
    return folder


def opened(folder):
    return Shards(folder, Pictures(()), seed=1)


def keys(data, count):
    return [key for batch in islice(data, count) for key in batch["key"]]


def driven(folder):
    """Single ranks and workers of 4,096 read what one rank alone reads in their place.

    Prints how many indexes the last rank of 4 reads for its first batch, how many that of 4,096
    reads, and the greatest memory in KiB.
    """
    shards, alone = opened(folder), Order([EACH] * SHARDS, seed=1, block=64, shuffle=True)

    def places(numbers):
        return [f"{t:06d}/{place:04d}" for t, place in (next(alone.places(n)) for n in numbers)]

    start = Position(7, WORLD * BATCH, offset=3).consumed
    for rank in SOME:
        numbers = islice(sample_numbers(BATCH, rank, WORLD, start), 3)
        want = places(chain.from_iterable(numbers))
        assert keys(loader(shards, BATCH, rank, WORLD, start), 3) == want
        asked = loading.get_worker_info
        for w in (0, 1, WORKERS - 1):  # worker w makes the batches w, w + 16, ...
            info = SimpleNamespace(id=w, num_workers=WORKERS)
            loading.get_worker_info = lambda info=info: info
            items = iter(loader(shards, BATCH, rank, WORLD, start).dataset)
            first = start + (w * WORLD + rank) * BATCH
            assert [next(items)["key"] for _ in (0, 1)] == places((first, first + 1))
        loading.get_worker_info = asked
    # The same samples of one step by another world: 1,024 ranks that accumulate over four batches.
    share, times = accumulation(WORLD * BATCH, BATCH, 1024)
    for rank in (0, 1023):
        read = keys(loader(shards, share, rank, 1024, start), times)
        numbers = sample_numbers(share, rank, 1024, start, times)
        assert read == places(chain.from_iterable(numbers))
    counts, load, loads = [], corpus.load, []
    corpus.load = lambda *where: loads.append(where) or load(*where)
    for world in (4, WORLD):
        loads.clear()
        next(iter(loader(shards, BATCH, world - 1, world, 11 * world * BATCH)))
        counts.append(len(loads))
    print(json.dumps([*counts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


@pytest.mark.slow
def test_single_ranks_of_many_read_and_start_like_those_of_few_within_a_gibibyte(folder, tmp_path):
    """In a process of its own, where no shapes are checked: that would take most of the time."""
    job = Job(driven, (folder,), out=tmp_path)
    assert job.wait(600) == [0], job.output()
    few, many, memory = json.loads(job.output().strip().split("\n")[-1])
    assert max(few, many) <= BATCH  # one for each sample, if that
    assert memory < 2**20


@pytest.mark.slow
def test_sixteen_real_ranks_take_the_samples_that_are_computed(tmp_path):
    shards, seen = tmp_path / "shards", tmp_path / "seen"
    shards.mkdir(), seen.mkdir()
    for t in range(3):
        members = [m for i in range(EACH) for m in sample(f"{i:04d}", EACH * t + i)]
        write(shards / f"{t:05d}.tar", members)
    arguments = ["train", *small.SR, "batch=16", "images=32", f"data.path={shards}"]
    arguments += [f"run={tmp_path / 'run'}", "trainer.devices=16"]
    job = Job(recorded, (arguments, seen), out=tmp_path / "out", ranks=16)
    assert job.wait(300) == [0] * 16, job.output()
    taken = {int(f.stem.split("-")[1]): json.loads(f.read_text()) for f in seen.iterdir()}
    for rank in range(16):
        want = islice(sample_numbers(1, rank, 16), 2)
        assert taken[rank] == list(chain.from_iterable(want))
    assert np.array_equal(np.sort(np.concatenate(list(taken.values()))), np.arange(32))
