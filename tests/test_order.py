"""Claims about the order of samples: one order of (seed, epoch), whoever reads how much of it."""

import io
import pickle
from itertools import chain

import pytest
import torch
from PIL import Image

from cascade.data.loading import loader
from cascade.data.order import Order
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.draws import generator
from cascade.errors import UserError
from tests.test_shards import sample, write

COUNTS = (5, 0, 7, 1, 3, 8, 2)


def epoch(order, number=0):
    return [next(order.places(n)) for n in range(number * len(order), (number + 1) * len(order))]


def everything(counts):
    return [(tar, place) for tar, count in enumerate(counts) for place in range(count)]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_each_sample_comes_once_an_epoch_and_few_tars_are_open_at_a_time(block):
    order = Order(COUNTS, seed=3, block=block, shuffle=True)
    for number in range(3):
        places = epoch(order, number)
        assert sorted(places) == everything(COUNTS)
        seen = [tar for tar, _ in places]
        for n, tar in enumerate(seen):  # a tar that comes back belongs to the block at hand
            last = len(seen) - 1 - seen[::-1].index(tar)
            assert len(set(seen[n : last + 1])) <= block
    assert epoch(order, 1) == epoch(Order(COUNTS, seed=3, block=block, shuffle=True), 1)
    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(Order(COUNTS, seed=4, block=block, shuffle=True))


def test_a_single_block_is_one_permutation_of_all_samples():
    samples, order = everything(COUNTS), Order(COUNTS, seed=5, block=7, shuffle=True)
    for number in range(2):
        shuffled = generator(5, "order", number).permutation(len(samples))
        assert epoch(order, number) == [samples[i] for i in shuffled]


def test_blocks_are_dealt_anew_in_each_epoch():
    order = Order((4,) * 12, seed=0, block=3, shuffle=True)
    blocks = [
        {frozenset(t for t, _ in epoch(order, e)[i : i + 12]) for i in (0, 12, 24, 36)}
        for e in range(2)
    ]
    assert all(len(tars) == 3 for tars in chain(*blocks))
    assert blocks[0] != blocks[1]
    assert epoch(Order((4,) * 12, 0, 3, shuffle=False), 1) == everything((4,) * 12)


def test_those_that_stand_in_are_of_the_block_and_each_comes_once():
    order = Order(COUNTS, seed=1, block=2, shuffle=True)
    places = epoch(order)
    for n in range(len(order)):
        ring = list(order.places(n))
        assert ring[0] == places[n]
        assert len(set(ring)) == len(ring)
        tars = {tar for tar, _ in ring}
        assert len(tars) <= 2
        assert sorted(ring) == [p for p in everything(COUNTS) if p[0] in tars]
        if n + 1 < len(order) and places[n + 1][0] in tars:
            assert ring[1] == places[n + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five shards of unequal length with the same keys; the block is 2."""
    folder, numbers = tmp_path_factory.mktemp("order"), iter(range(25))
    for shard, count in enumerate((4, 7, 1, 6, 7)):
        members = [m for i in range(count) for m in sample(f"{i:04d}", next(numbers))]
        write(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.mark.parametrize(
    ("world", "workers", "start", "batch"),
    [(1, 0, 0, 4), (1, 2, 3, 7), (2, 0, 11, 3), (2, 3, 0, 5), (4, 0, 24, 2), (3, 1, 52, 6)],
)
def test_all_ranks_and_workers_together_read_the_one_order(folder, world, workers, start, batch):
    shards = Shards(folder, Pictures(()), seed=2, block=2)
    batches = -(-60 // (world * batch))  # over two epochs
    ranks = [loader(shards, batch, rank, world, start, batches, workers) for rank in range(world)]
    read = [key for step in zip(*ranks) for part in step for key in part["key"]]
    alone = Shards(folder, Pictures(()), seed=2, block=2)
    assert read == [alone[n]["key"] for n in range(start, start + len(read))]


def test_a_run_goes_on_in_its_order_with_other_ranks_from_any_step(folder):
    shards = Shards(folder, Pictures(()), block=2)
    whole = [shards[n]["key"] for n in range(48)]
    for step in range(0, 6):
        keys = [
            key
            for world, batch, start, batches in ((2, 4, 0, step), (4, 2, 8 * step, 6 - step))
            for parts in zip(
                *(loader(shards, batch, r, world, start, batches) for r in range(world))
            )
            for part in parts
            for key in part["key"]
        ]
        assert keys == whole


def test_shards_travel_to_a_worker_that_shares_nothing(folder):
    shards = Shards(folder, Pictures((8,)), block=2)
    shards[0]
    moved = pickle.loads(pickle.dumps(shards))
    for n in range(30):
        assert moved[n]["key"] == shards[n]["key"]
        assert torch.equal(moved[n]["image_8"], shards[n]["image_8"])


def test_a_bad_sample_is_replaced_from_its_own_block(tmp_path):
    for shard in range(4):
        bad = [(f"bad{shard}.jpg", b"<html>"), (f"bad{shard}.txt", b"no")]
        good = [m for i in range(3) for m in sample(f"{i}", 3 * shard + i)]
        write(tmp_path / f"{shard:05d}.tar", good[:3] + bad + good[3:])
    shards = Shards(tmp_path, Pictures((8,)), block=1)
    items = [shards[n] for n in range(32)]
    met = {}
    for n, item in enumerate(items):
        for skip in item["skipped"]:
            met.setdefault((n // 16, skip.key), []).append(n)
            assert skip.key.split("/")[0] == item["key"].split("/")[0]
    assert len(met) == 8  # each of the four, in each of two epochs
    assert all(len(numbers) == 1 for numbers in met.values())


def test_a_block_without_a_good_sample_ends_in_one_line(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    write(tmp_path / "0.tar", [("a.png", file.getvalue()), ("a.txt", b"fine")])
    bad = [(f"{i}.{ext}", b"no") for i in range(5) for ext in ("jpg", "txt")]
    write(tmp_path / "1.tar", bad)
    shards = Shards(tmp_path, Pictures((8,)), block=1, shuffle=False)
    assert shards[0]["key"] == "0/a"
    with pytest.raises(UserError, match=r"bad from 1/1 on \(5 broken picture\)"):
        shards[2]
    with pytest.raises(UserError, match="block=0"):
        Shards(tmp_path, Pictures((8,)), block=0)


def test_a_hundred_million_samples_are_ordered_a_block_at_a_time():
    order = Order([10_000] * 10_000, seed=0, block=64, shuffle=True)
    assert len(order) == 100_000_000
    first, last = order.places(0), order.places(99_999_999)
    assert len({next(first)[0] for _ in range(5000)}) == 64
    assert len({next(last)[0] for _ in range(5000)}) == 10_000 % 64
