"""Claims about indexes: they say what the tars hold; damage to both is found, and obeyed never."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch

from cascade.cli import main
from cascade.data import preflight as preflight_module
from cascade.data.embeddings import Embeddings, write_embeddings
from cascade.data.shards import Shards
from cascade.data.tars import corpus as module
from cascade.data.tars import dataset as dataset_module
from cascade.data.tars.corpus import Corpus
from cascade.data.tars.dataset import DATASET, index_folder
from cascade.data.tars.index import load, save, scan
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from tests.test_shards import SMALL, number, picture, sample, write

REMEDY = "run `cascade data index"


def indexed(folder):
    return index_folder(folder, lambda done, total: None)


@pytest.fixture
def folder(tmp_path):
    """Three shards of eight samples with the same keys in each, and one of another split."""
    for s in range(3):
        members = [m for i in range(8) for m in sample(f"{i:04d}", 8 * s + i)]
        write(tmp_path / f"train-{s:05d}.tar", members)
    write(tmp_path / "val-00000.tar", sample("v", 3))
    return tmp_path


def pairs(shards, count=None):
    """(key, caption, number of the picture) of the first items."""
    items = [shards[n] for n in range(count or len(shards))]
    return [(item["key"], item["caption"], number(item["image_8"])) for item in items]


def assert_paired(found):
    assert all(int(caption) == shown for _, caption, shown in found)


def test_an_indexed_folder_is_read_as_one_that_is_not_and_no_header_again(folder, monkeypatch):
    captions = {"txt": 0.5, "long_caption": 0.5}
    options = {"captions": captions, "seed": 1, "block": 2, "json_fields": ("scene",)}
    before = Shards(folder, SMALL, **options)
    indexed(folder)
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("a header was read"))
    after = Shards(folder, SMALL, **options)
    for n in range(48):
        a, b = before[n], after[n]
        assert [a[k] for k in ("key", "caption", "scene")] == [b[k] for k in b if k in a][1:4]
        assert a["image_8"].equal(b["image_8"])
    assert len(Shards(folder, SMALL, split="val")) == 1
    assert len(Shards(str(folder / "train-*1.tar"), SMALL)) == 8
    assert len(Shards([folder / "train-00002.tar"], SMALL)) == 8


def test_a_start_reads_the_totals_and_a_tar_s_index_when_a_sample_of_it_is_needed(folder):
    indexed(folder)
    for path in folder.glob("*.index"):
        path.rename(path.with_suffix(".away"))
    shards = Shards(folder, SMALL, shuffle=False, block=1)
    assert len(shards) == 24
    with pytest.raises(UserError, match=f"train-00000.index is missing or damaged: {REMEDY}"):
        shards[0]
    (folder / "train-00001.away").rename(folder / "train-00001.index")
    assert shards[8]["key"] == "train-00001/0000"
    assert len(shards.corpus._open) == 1


def test_counts_follow_the_captions_asked_for(tmp_path):
    both, txt, fields = sample("both", 1), sample("txt", 2)[:2], sample("json", 3)
    del fields[1]
    write(tmp_path / "0.tar", [*both, *txt, *fields])
    lengths = {}
    for how in ("scanned", "indexed"):
        for captions in ({"txt": 1.0}, {"long_caption": 1.0}, {"txt": 0.5, "long_caption": 0.5}):
            shards = Shards(tmp_path, SMALL, captions=captions, max_skip_fraction=1.0)
            found = {shards[n]["key"] for n in range(len(shards))}
            assert shards.skipped.total() == 3 - len(found)
            lengths.setdefault(how, []).append(sorted(found))
        indexed(tmp_path)
    assert lengths["scanned"] == lengths["indexed"]
    assert [len(found) for found in lengths["indexed"]] == [2, 2, 3]


def test_keys_are_kept_as_they_are(tmp_path):
    names = ["a/b c", "ключ", "x\udcff", 'q"']
    members = [m for i, name in enumerate(names) for m in sample(name, i)]
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    indexed(tmp_path)
    index = load(tmp_path / "0.tar")
    assert [index.key(row) for row in range(4)] == names
    assert_paired(pairs(Shards(tmp_path, SMALL)))


@pytest.fixture
def whole(tmp_path):
    """Ten samples; their bytes, and the offsets of all headers."""
    path = write(tmp_path / "whole.tar", [m for i in range(10) for m in sample(f"{i:04d}", i)])
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    data = path.read_bytes()
    path.unlink()
    return data, headers


def found_in(folder, data):
    """What Shards reads of a tar of these bytes, scanned and indexed, and why some is left out."""
    tar = folder / "0.tar"
    (folder / DATASET).unlink(missing_ok=True)
    tar.write_bytes(data)
    try:
        before = Shards(folder, SMALL, shuffle=False)
    except UserError as error:
        assert "no usable sample (1 cut short)" in str(error)  # noqa: PT017
        return []
    found = pairs(before)
    indexed(folder)
    after = Shards(folder, SMALL, shuffle=False)
    assert pairs(after) == found
    assert after.skipped == before.skipped == ({} if len(found) == 10 else {"cut short": 1})
    assert_paired(found)
    assert [key for key, _, _ in found] == [f"0/{i:04d}" for i in range(len(found))]
    return found


def test_a_tar_cut_anywhere_loses_what_is_behind_and_pairs_nothing_falsely(tmp_path, whole):
    data, headers = whole
    rng = np.random.default_rng(0)
    end = headers[-1] + 1024
    edges = [edge + d for edge in headers[::4] for d in (-1, 0, 1, 511, 512, 513)]
    for cut in sorted({*rng.integers(1, end + 512, 30).tolist(), *edges, 0, end + 511}):
        if cut < 0:
            continue
        seen = sum(first + 512 <= cut for first in headers[::3])
        assert len(found_in(tmp_path, data[:cut])) == max(0, seen - 1), cut
    assert len(found_in(tmp_path, data[: end + 512])) == 10


def test_a_flipped_bit_in_a_header_loses_what_is_behind_and_pairs_nothing_falsely(tmp_path, whole):
    data, headers = whole
    rng = np.random.default_rng(1)
    for _ in range(60):
        n, byte, bit = rng.integers(len(headers)), rng.integers(500), rng.integers(8)
        flipped = bytearray(data)
        flipped[headers[n] + byte] ^= 1 << int(bit)
        found = found_in(tmp_path, bytes(flipped))
        harmless = 148 <= byte < 156  # the checksum's own digits, or what pads them
        assert len(found) == max(0, -(-int(n) // 3) - 1) or (harmless and len(found) == 10)


def test_a_file_never_filled_and_tars_one_behind_the_other_count_as_cut(tmp_path, whole):
    data, headers = whole
    zeros = data[: headers[15]] + bytes(2**21)
    assert len(found_in(tmp_path, zeros)) == 4
    assert len(found_in(tmp_path, data + data)) == 9


def test_a_corpus_damaged_in_every_way_is_counted_and_pairs_nothing_falsely(tmp_path, capsys):
    good = [m for i in range(6) for m in sample(f"{i:04d}", i)]
    write(tmp_path / "0.tar", good)
    write(tmp_path / "1.tar", [*good[:3], ("x.txt", b"4"), ("y.jpg", picture(5)), *sample("z", 7)])
    write(tmp_path / "2.tar", [*good[:6], ("0000.jpg", picture(9)), ("0000.txt", b"9")])
    write(tmp_path / "3.tar", [("h.jpg", b"<html>"), ("h.txt", b"no"), *good[3:9]])
    (tmp_path / "4.tar").write_bytes(b"")
    (tmp_path / "5.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:9000])
    assert main(["data", "index", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / '4.tar'} is cut short after 0 samples: fetch or write it again" in said
    shards = Shards(tmp_path, SMALL, max_skip_fraction=0.5)
    reasons = {"cut short": 2, "no picture": 1, "no caption": 1, "duplicate key": 1}
    assert shards.skipped == reasons
    about = json.loads((tmp_path / DATASET).read_text())
    assert about["totals"]["left_out"] == reasons
    assert about["totals"]["samples"] == len(shards) == sum(shards.corpus.counts)
    assert about["totals"]["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    found = pairs(shards)
    assert_paired(found)
    items = [shards[n] for n in range(len(shards))]
    assert {skip.key for item in items for skip in item["skipped"]} == {"3/h"}
    assert len({item["key"] for item in items}) == len(shards) - 1


def test_a_damaged_index_is_refused_and_made_again(folder):
    indexed(folder)
    path = folder / "train-00001.index"
    data = path.read_bytes()
    flips = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(0, len(data), 97)]
    for damaged in (b"", data[:50], data[:-1], data + b"x", *flips):
        path.write_bytes(damaged)
        try:
            load(folder / "train-00001.tar")
        except UserError as error:
            assert f"missing or damaged: {REMEDY} {folder}`" in str(error)  # noqa: PT017
        else:
            pytest.fail("a damaged index was taken for a whole one")
    indexed(folder)
    assert load(folder / "train-00001.tar").summary().samples == 8


def test_a_folder_that_is_not_as_it_was_indexed_is_refused(folder):
    indexed(folder)
    tar, text = folder / "train-00001.tar", (folder / DATASET).read_text()
    other = folder / "train-00009.tar"
    shutil.copy(tar, other)
    with pytest.raises(UserError, match=rf"train-00009.tar is not in dataset.json: {REMEDY}"):
        Shards(folder, SMALL)
    other.unlink()
    tar.rename(folder / "away")
    with pytest.raises(UserError, match=rf"train-00001.tar is gone: {REMEDY}"):
        Shards(folder, SMALL)
    (folder / "away").rename(tar)
    shards, data = Shards(folder, SMALL, shuffle=False), tar.read_bytes()
    tar.write_bytes(data.replace(b"0000.jpg", b"9999.jpg"))
    for start in (lambda: Shards(folder, SMALL), lambda: shards[8]):
        with pytest.raises(UserError, match=rf"train-00001.tar has changed.*{REMEDY}"):
            start()
    tar.write_bytes(data)
    indexed(folder)
    (folder / DATASET).write_text(text.replace('"samples": 8', '"samples": 7'))
    os.utime(tar, ns=(0, json.loads(text)["tars"][tar.name]["mtime_ns"]))
    indexes = {path: path.read_bytes() for path in folder.glob("*.index")}
    with pytest.raises(UserError, match=r"its index contradicts dataset\.json"):
        Shards(folder, SMALL, shuffle=False)[0]
    for broken in (text[:-9], "[]", '{"tars": {"train-00000.tar": {"samples": "8"}}}'):
        (folder / DATASET).write_text(broken)
        with pytest.raises(UserError, match=f"dataset.json is damaged: {REMEDY}"):
            Shards(folder, SMALL)
    indexed(folder)
    assert len(Shards(folder, SMALL)) == 24
    assert set(indexes) == set(folder.glob("*.index"))


def test_an_interrupted_call_goes_on(folder, monkeypatch):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(folder, stop)
    assert not (folder / DATASET).exists()
    scanned = []
    monkeypatch.setattr(
        dataset_module, "scan", lambda tar, keys: scanned.append(tar.name) or scan(tar)
    )
    dataset, unreadable = indexed(folder)
    assert scanned == ["train-00002.tar", "val-00000.tar"]
    assert (len(dataset.tars), unreadable) == (4, [])
    assert not list(folder.glob(".*"))


def test_the_command_says_what_there_is_and_what_is_broken(folder, capsys):
    assert main(["data", "index", str(folder)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "train" in line and " 24 " in line]
    (folder / "train-00004.tar").mkdir()
    assert main(["data", "index", str(folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train-00004.tar: Is a directory: repair or remove it" in error
    assert main(["data", "index", str(folder / "nowhere")]) == 2
    (folder / "empty").mkdir()
    write(folder / "empty" / "0.tar", [("a.txt", b"alone")])
    assert main(["data", "index", str(folder / "empty")]) == 2
    assert "no sample" in capsys.readouterr().err


def test_a_long_search_without_an_index_says_so(folder, monkeypatch, caplog):
    monkeypatch.setattr(module, "LONG", -1.0)
    Corpus(folder, "train", {"txt"}, 1)
    assert caplog.text.count("has no index, so all 3 tars are searched") == 1
    assert f"{REMEDY} {folder}`" in caplog.text


def test_a_tar_that_ends_early_behind_a_good_index_gives_bad_samples_only(folder):
    indexed(folder)
    shards = Shards([folder / "train-00000.tar"], SMALL, shuffle=False)
    shards[0]
    with open(folder / "train-00000.tar", "r+b") as file:  # while it is open
        file.truncate(scan(folder / "train-00000.tar").spans[4, 0, 0])
    item = shards[4]
    assert item["key"] == "train-00000/0000"
    assert {skip.reason for skip in item["skipped"]} == {"cannot be read"}


def embed(folder, out, lacking=lambda key: False):
    for tar in folder.glob("*.tar"):
        index = scan(tar)
        keys = [k for k in map(index.key, range(len(index.ends))) if not lacking(k)]
        rows = {"clip_image": np.zeros((len(keys), 2), np.float32)}
        tensors = {name: torch.from_numpy(x) for name, x in rows.items()}
        write_embeddings(out, tar.stem, keys, tensors, {})
    return {"clip": Embeddings(out)}


def test_preflight_finds_in_seconds_what_would_fail_in_hours(folder, tmp_path, monkeypatch):
    Shards(folder, SMALL, embeddings=embed(folder, tmp_path / "good")).check(24)
    with pytest.raises(UserError, match="batch=25, but there are 24 samples"):
        Shards(folder, SMALL).check(25)
    some = embed(folder, tmp_path / "some", lambda key: key < "0003")
    with pytest.raises(UserError, match=r"of 24 samples .* 9 are bad \(9 no embedding\)"):
        Shards(folder, SMALL, embeddings=some).check(4)
    with pytest.raises(UserError, match=r"has long, but .*long_caption.*: set data.captions"):
        Shards(folder, SMALL, captions={"txt": 0.1, "long": 0.9}).check(4)
    with pytest.raises(UserError, match="has mask, but"):
        Shards(folder, SMALL, json_fields=("scene", "mask")).check(4)
    monkeypatch.setattr(preflight_module.os, "access", lambda path, how: "00002" not in str(path))
    with pytest.raises(UserError, match=r"cannot read .*train-00002.tar \(1 such tars\)"):
        Shards(folder, SMALL).check(4)


def test_preflight_refuses_pictures_that_are_none(tmp_path):
    members = [m for i in range(40) for m in ((f"{i:02d}.jpg", b"<html>"), (f"{i:02d}.txt", b"x"))]
    write(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=r"32 samples .* 32 are bad \(32 broken picture\)"):
        Shards(tmp_path, SMALL).check(4)
    Shards(tmp_path, Pictures(())).check(4)  # what is not read does not matter


def test_an_index_is_small_and_holds_no_code(folder):
    index = scan(folder / "train-00000.tar")
    save(index)
    size = (folder / "train-00000.index").stat().st_size
    assert size < 400 + 8 * 64
    again = load(folder / "train-00000.tar")
    assert again.summary() == index.summary()
    assert np.array_equal(again.spans, index.spans)
