"""Claims about tars: links are followed or named, and what is compressed or a Mac's is told."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from subprocess import run

import pytest

from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars.index import scan
from cascade.data.tars.tar import HARD_LINK, LINK, STREAMED_LINK, contents
from cascade.data.tars.urls import streamed
from cascade.errors import UserError
from cascade.eval.pictures.sets import picture_set
from tests.hostile import refused
from tests.test_index import indexed
from tests.test_shards import SMALL, assert_paired, picture, sample, write


def packed(tar, folder, *names):
    """What GNU tar makes of files, links among them."""
    run(["tar", "-cf", tar, "-C", folder, *names], check=True)
    return tar


@pytest.fixture
def linked(tmp_path):
    """Eight samples as GNU tar packs them, of which four pictures are links to the other four."""
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for i in range(4):
        (folder / f"a{i}.jpg").write_bytes(picture(i))
        (folder / f"a{i}.txt").write_text(str(i))
        (folder / f"deep/b{i}.txt").write_text(str(i))
    (folder / "deep/b0.jpg").hardlink_to(folder / "a0.jpg")
    (folder / "deep/b1.jpg").hardlink_to(folder / "a1.jpg")
    (folder / "deep/b2.jpg").symlink_to("../a2.jpg")
    (folder / "deep/b3.jpg").symlink_to("b4.jpg")  # and on
    (folder / "deep/b4.jpg").symlink_to("../a3.jpg")
    (folder / "deep/b4.txt").write_text("3")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
    return packed(tmp_path / "train-0.tar", folder, *names), folder


def test_links_within_a_tar_are_followed_in_training_and_in_evaluation(linked, tmp_path):
    _, folder = linked
    shards = Shards(tmp_path, SMALL, shuffle=False)
    assert (len(shards), shards.skipped) == (9, {})
    assert_paired(shards)
    texts = [p.unlink() for p in folder.rglob("*.txt")]
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")]
    of_tar = picture_set(packed(tmp_path / "set.tar", folder, *sorted(names)))
    assert len(of_tar) == len(texts) == 9
    assert (of_tar.ids, of_tar.digests) == (picture_set(folder).ids, picture_set(folder).digests)


def test_links_that_lead_to_nothing_are_counted_and_named(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text("1")
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "b.jpg").symlink_to("../elsewhere.jpg")
    (folder / "c.jpg").symlink_to("d.jpg")
    (folder / "d.jpg").symlink_to("c.jpg")
    names = ("a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt", "d.jpg")
    tar = packed(tmp_path / "train-0.tar", folder, *names)
    index = scan(tar)
    assert (index.left_out, index.such_as) == ({LINK: 3}, {LINK: "b.jpg"})
    with pytest.raises(UserError, match=rf"3 of 4 .*3 {LINK} \(such as b.jpg\)"):
        Shards(tmp_path, SMALL)
    assert f"b.jpg is a {LINK}" in refused(lambda: picture_set(tar))
    assert "b.jpg is a link to ../elsewhere.jpg" in refused(lambda: picture_set(folder))


def test_a_stream_counts_and_names_the_links_that_it_cannot_follow(linked):
    tar, _ = linked
    items = list(Stream(str(tar), SMALL, False, shuffle=False).items(range(9)))
    bad = [skip for item in items for skip in item["skipped"]]
    assert [item["key"] for item in items] == [f"train-0/a{i}" for i in range(4)]
    stream = Stream(str(tar), SMALL, False, shuffle=False)
    lost: list = []
    list(stream._read(["train-0"], lost))
    assert [reason for _, reason in lost] == [HARD_LINK] * 2 + [STREAMED_LINK] * 3
    assert not bad


def test_a_stream_counts_a_sample_of_which_it_sees_a_hard_link_alone(tmp_path):
    """GNU tar writes a file's second name as a link to the first, whatever their kinds."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "b.cls").write_bytes(b"1")
    (folder / "a.jpg").hardlink_to(folder / "b.cls")
    tar = packed(tmp_path / "train-0.tar", folder, "a.jpg", "b.cls")
    lost: list = []
    assert not list(streamed("t", str(tar), lost))
    assert [key for key, _ in lost] == ["t/a", "t/b"]
    assert scan(tar).left_out.total() == 2


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_told_from_a_damaged_one(tmp_path, pack):
    tar = write(tmp_path / "train-0.tar", sample("a", 1))
    tar.write_bytes(pack(tar.read_bytes()))
    for read in (lambda: Shards(tmp_path, SMALL), lambda: picture_set(tar)):
        assert "unpack it" in refused(read, "train-0.tar: it is ")
    tar.rename(tmp_path / "train-0.tar.gz")
    for read in (lambda: Shards(tmp_path, SMALL), lambda: picture_set(tmp_path)):
        assert "train-0.tar.gz is compressed" in refused(read, "unpack")


def test_what_a_mac_leaves_beside_tars_is_none(tmp_path):
    write(tmp_path / "train-0.tar", sample("a", 1))
    (tmp_path / "._train-0.tar").write_bytes(b"\0\5\x16\7left by a Mac")
    dataset, unreadable = indexed(tmp_path)
    assert ([*dataset.tars], unreadable) == (["train-0.tar"], [])
    assert len(Shards(tmp_path, SMALL)) == 1
    assert picture_set(tmp_path).ids == ["train-0/a"]


def test_the_end_of_a_tar_behind_a_hard_link_or_a_sparse_file_is_its_end(tmp_path):
    members = [tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")]
    members[0].size = len(picture(1))
    members[1].type, members[1].linkname, members[1].size = tarfile.LNKTYPE, "a.jpg", 5000
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(members[0], io.BytesIO(picture(1)))
        tar.addfile(members[1])
    found = contents(tmp_path / "0.tar")
    assert found.whole
    a, b = found.members
    assert (a.offset, a.bytes) == (b.offset, b.bytes)


def test_a_hard_link_to_a_symbolic_link_leads_from_where_it_is_itself(tmp_path):
    """As GNU tar unpacks it: `far/b.txt` leads to `far/a.txt`, and `lost/b.txt` to nothing."""
    (tmp_path / "in").mkdir()
    for place in ("a.txt", "far/a.txt"):
        (tmp_path / "in" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / place).write_text(place)
    (tmp_path / "in/lost").mkdir()
    (tmp_path / "in/b.txt").symlink_to("a.txt")
    for place in ("far", "lost"):
        os.link(tmp_path / "in/b.txt", tmp_path / "in" / place / "b.txt", follow_symlinks=False)
    names = ["a.txt", "far/a.txt", "b.txt", "far/b.txt", "lost/b.txt"]
    tar = packed(tmp_path / "0.tar", tmp_path / "in", *names)
    found = {member.name: member for member in contents(tar).members}
    assert found["b.txt"].offset == found["a.txt"].offset
    assert found["far/b.txt"].offset == found["far/a.txt"].offset
    assert found["lost/b.txt"].lost == LINK


def test_a_tar_under_a_folder_with_brackets_is_that_tar(tmp_path):
    """A glob of its name finds the other one."""
    for name, number in (("scale=[1]", 1), ("scale=1", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train-0.tar", sample("a", number))
    tar = tmp_path / "scale=[1]" / "train-0.tar"
    assert Shards(str(tar), SMALL)[0]["caption"] == "1"
    assert Shards(str(tar.parent), SMALL)[0]["caption"] == "1"


def test_a_stream_of_a_file_with_braces_or_a_colon_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("{a,b}-0.tar", "c:d-0.tar", "e::f-0.tar"):
        write(tmp_path / name, sample("a", 1))
        (item,) = Stream(name, SMALL, False, shuffle=False, split="all").items(range(2))
        assert item["caption"] == "1"
        (item,) = Stream(name, SMALL, False, split="all", buffer=1).items(range(1))
        assert item["caption"] == "1"


def test_members_that_lie_apart_are_one_sample_where_nothing_else_can_be_meant(tmp_path):
    """As of files that were listed by their kind; the pairs are those of a sorted tar."""
    members = [m for i in range(8) for m in sample(f"{i:04d}", i)]
    apart = sorted(members, key=lambda member: member[0].rpartition(".")[2])
    write(tmp_path / "train-0.tar", apart)
    shards = Shards(tmp_path, SMALL, shuffle=False)
    assert (len(shards), shards.skipped) == (8, {})
    assert_paired(shards)
    twice = [*apart, ("0000.jpg", picture(9))]  # which of the two is meant?
    write(tmp_path / "train-0.tar", twice)
    shards = Shards(tmp_path, SMALL, max_skip_fraction=1.0)
    assert len(shards) == 7
    assert_paired(shards)


def test_a_stream_of_an_unsorted_tar_says_what_it_is(tmp_path, caplog):
    members = [m for i in range(4) for m in sample(f"{i:04d}", i)]
    apart = sorted(members, key=lambda member: member[0].rpartition(".")[2])
    write(tmp_path / "0.tar", apart)
    with pytest.raises(UserError, match="no usable sample"):
        next(Stream(str(tmp_path / "0.tar"), SMALL, False, shuffle=False).items(range(1)))
    assert caplog.text.count("tar --sort=name") == 1
