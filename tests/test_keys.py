"""Claims about keys with dots: lost samples are counted as such and named, or read as meant."""

import logging

import pytest
from webdataset.tariterators import tarfile_samples

from cascade.cli import main
from cascade.data.precompute import made_of
from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars.index import load
from cascade.errors import UserError
from tests.hostile import refused
from tests.test_index import indexed
from tests.test_shards import SMALL, assert_paired, sample, write

KEYS = [*(f"step_0.0{i}" for i in range(8)), *(f"v1.5_{i:04d}" for i in range(8))]


@pytest.fixture
def folder(tmp_path):
    """Sixteen samples with a dot in their keys, two without."""
    members = [m for i, key in enumerate([*KEYS, "w0", "w1"]) for m in sample(key, i)]
    write(tmp_path / "train-0.tar", members)
    return tmp_path


def test_samples_lost_to_a_dot_are_counted_one_by_one_and_named(folder, capsys):
    plain = list(tarfile_samples([{"url": str(folder / "train-0.tar")}]))
    assert len(plain) == 4  # what webdataset makes of them
    says = refused(lambda: Shards(folder, SMALL))
    assert "16 of 18 samples are left out (16 dot in the key (such as step_0.00.jpg)" in says
    assert "data.keys=last_dot" in says
    assert len(Shards(folder, SMALL, max_skip_fraction=1.0)) == 2
    assert main(["data", "index", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "16 samples such as step_0.00.jpg are left out" in said
    assert "last_dot" in said


def test_the_last_dot_ends_a_key_where_that_is_said(folder):
    shards = Shards(folder, SMALL, keys="last_dot", shuffle=False)
    assert [shards[n]["key"] for n in range(18)] == [f"train-0/{k}" for k in [*KEYS, "w0", "w1"]]
    assert_paired(shards)
    urls = str(folder / "train-0.tar")
    stream = Stream(urls, SMALL, False, shuffle=False, keys="last_dot")
    assert [item["key"] for item in stream.items(range(20))] == [
        shards[n]["key"] for n in range(18)
    ]
    for make in (
        lambda: Shards(folder, SMALL, keys="dot"),
        lambda: Stream(urls, SMALL, False, keys="dot"),
    ):
        refused(make, "first_dot or last_dot")


def test_an_index_keeps_its_rule_and_every_command_has_it(folder):
    indexed(folder)
    with pytest.raises(UserError, match=r"keys=first_dot, not last_dot: .* --keys last_dot"):
        Shards(folder, SMALL, keys="last_dot")
    assert main(["data", "index", str(folder), "--keys", "last_dot"]) == 0
    indexed(folder)
    assert load(folder / "train-0.tar").keys == "last_dot"
    assert len(Shards(folder, SMALL)) == len(Shards(folder, SMALL, keys="last_dot")) == 18
    assert sum(map(len, made_of(folder / "train-0.tar", {"txt"}, id))) == 18
    refused(lambda: Shards(folder, SMALL, keys="first_dot"), "--keys first_dot")


def test_a_stream_counts_them_too(folder, caplog):
    caplog.set_level(logging.WARNING)
    lost: list = []
    stream = Stream(str(folder / "train-0.tar"), SMALL, False, shuffle=False)
    assert [s.key for s in stream._read(["train-0"], lost)] == ["w0", "w1"]
    assert [reason for _, reason in lost] == ["dot in the key"] * 16
    assert caplog.text.count("data.keys=last_dot") == 1


def test_what_stands_beside_a_sample_under_its_key_is_no_sample(tmp_path):
    members = [*sample("a", 1), ("a.seg.png", b"mask"), ("a.v2.txt", b"another"), *sample("b", 2)]
    write(tmp_path / "train-0.tar", members)
    shards = Shards(tmp_path, SMALL)
    assert (len(shards), shards.skipped) == (2, {})
    write(tmp_path / "train-0.tar", [*members, *sample("b.1", 3)])
    shards = Shards(tmp_path, SMALL, max_skip_fraction=1.0)
    assert (len(shards), shards.skipped) == (2, {"dot in the key": 1})
