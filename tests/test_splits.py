"""Claims about splits: what is called held out is, the same everywhere, and never trained on."""

import hashlib
import json

import pytest

from cascade.cli import main
from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars.dataset import index_folder, read_dataset
from cascade.data.tars.splits import of_split
from tests.hostile import refused
from tests.test_shards import SMALL, picture, sample, write

SHARED = ["00000", "00001"]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train-0", "val-0", "unseen-0"], ["train-0"], ["val-0"]),
        (
            ["cc3m-train-0000", "cc3m-validation-0000"],
            ["cc3m-train-0000"],
            ["cc3m-validation-0000"],
        ),
        (["train_0", "valid_0", "test_0"], ["train_0"], ["valid_0"]),
        (["train2017-0", "val2017-0"], ["train2017-0"], ["val2017-0"]),
        (SHARED, SHARED, []),
        (["shard-000000", "shard-000001"], ["shard-000000", "shard-000001"], []),
        (["part1-0", "part2-0"], ["part1-0", "part2-0"], []),
        (["cc3m-0", "laion-0"], [], []),  # which is for training nobody said
        (["val-0"], [], ["val-0"]),
    ],
)
def test_names_say_what_is_for_training_and_what_is_held_out(tmp_path, names, train, val):
    for name in names:
        write(tmp_path / f"{name}.tar", sample("a", 1))
    for split, want in (("train", train), ("val", val)):
        urls = [str(tmp_path / f"{name}.tar") for name in names]
        assert of_split(names, split) == want
        if want:
            found = Shards(tmp_path, SMALL, split=split).corpus.paths
            assert [tar.stem for tar in found] == sorted(want)
            streamed = Stream(urls, SMALL, False, split=split)
            assert list(streamed.urls) == want
        else:
            says = refused(
                lambda split=split: Shards(tmp_path, SMALL, split=split), "the split all"
            )
            assert ("--val 1%" in says) == (split == "val")
    for name in {name.partition("-")[0] for name in names if "-" in name}:  # asked for by name
        assert of_split(names, name) == [n for n in names if n.startswith(f"{name}-")]
    assert of_split(names, "all") == names


@pytest.fixture
def folder(tmp_path):
    """240 samples as img2dataset names them; of each 24 the second half are copies of the first."""
    for s in range(10):
        members = [m for i in range(24) for m in sample(f"{s:05d}{i:04d}", 12 * (s % 2) + i % 12)]
        for n in range(0, len(members), 3):  # else there were 24 pictures
            members[n] = (members[n][0], picture(int(members[n + 1][1])) + bytes([s // 2]))
        write(tmp_path / f"{s:05d}.tar", members)
    return tmp_path


def pictures(shards):
    """The bytes of the picture of each sample, by key."""
    found = {}
    for tar in map(shards.corpus.__getitem__, range(len(shards.corpus.paths))):
        found |= {f"{tar.shard}/{tar.key(i)}": tar.read(i, "picture") for i in range(len(tar))}
    return found


def test_nothing_is_called_held_out_before_somebody_held_it_out(folder):
    for path in (folder, str(folder / "*.tar"), sorted(folder.glob("*.tar"))):
        refused(lambda path=path: Shards(path, SMALL, split="val"), "--val 1%")
        assert len(Shards(path, SMALL)) == len(Shards(path, SMALL, split="all")) == 240


def test_an_index_holds_out_a_share_by_the_bytes_of_pictures(folder, capsys):
    assert main(["data", "index", str(folder)]) == 0
    assert f"nothing is held out: `cascade data index {folder} --val 1%`" in capsys.readouterr().out
    whole = pictures(Shards(folder, SMALL))
    assert main(["data", "index", str(folder), "--val", "25%"]) == 0
    train, val = (pictures(Shards(folder, SMALL, split=split)) for split in ("train", "val"))
    first = {key: hashlib.sha256(data).digest() for key, data in whole.items()}
    # A quarter of what the first six bytes of the SHA-256 can be, by another implementation.
    expected = {key for key, digest in first.items() if digest[0] < 64}
    assert 0 < len(expected) < 120
    assert val.keys() == expected
    assert train.keys() == whole.keys() - expected
    assert not {*train.values()} & {*val.values()}  # copies of a picture lie on one side
    assert read_dataset(folder).held_out == 0.25
    assert len(pictures(Shards(folder, SMALL, split="all"))) == 240
    index_folder(folder, lambda *_: None)  # keeps it
    assert pictures(Shards(folder, SMALL, split="val")) == val
    totals = json.loads((folder / "dataset.json").read_text())["totals"]
    assert totals["held_out"]["samples"] == len(val)
    (folder / "00003.tar").rename(folder / "99999.tar")  # whatever a tar is called
    index_folder(folder, lambda *_: None)
    assert {*pictures(Shards(folder, SMALL, split="val")).values()} == {*val.values()}


@pytest.mark.parametrize(("val", "count"), [("40", 40), ("2", 2)])
def test_a_count_holds_out_so_many_and_copies_with_them(folder, val, count):
    index_folder(folder, lambda *_: None, val=val)
    found = Shards(folder, SMALL, split="val")
    assert count - 1 <= len(found) <= count
    assert len(found) + len(Shards(folder, SMALL)) == 240
    index_folder(folder, lambda *_: None, val="0")
    assert len(Shards(folder, SMALL)) == 240


@pytest.mark.parametrize("val", ["100%", "240", "-1", "none", "1e-9%", "0.0001"])
def test_a_share_that_holds_out_nothing_or_everything_is_refused(folder, val):
    refused(lambda: index_folder(folder, lambda *_: None, val=val), "--val")
    assert not (folder / "dataset.json").exists()


def test_tars_that_are_held_out_by_name_stay_what_they_are(folder):
    (folder / "00000.tar").rename(folder / "val-0.tar")
    for tar in folder.glob("0*.tar"):
        tar.rename(folder / f"train-{tar.name}")
    refused(lambda: index_folder(folder, lambda *_: None, val="10%"), "held out by name")
    (folder / "val-0.tar").rename(folder / "test-0.tar")
    index_folder(folder, lambda *_: None, val="10%")
    parts = [len(Shards(folder, SMALL, split=split)) for split in ("train", "val", "test")]
    assert sum(parts) == 240
    assert parts[2] == 24
    assert 0 < parts[1] < 60


def test_a_run_begun_before_asks_for_what_it_had(folder):
    before = Shards(folder, SMALL)
    order = [before[n]["key"] for n in range(240)]
    index_folder(folder, lambda *_: None, val="25%")
    kept = Shards(folder, SMALL, hold_out=0.0)
    assert [kept[n]["key"] for n in range(240)] == order
    assert kept.corpus.fingerprint == before.corpus.fingerprint
