"""The work of precomputing: shared by many, each shard made once and whole, whoever dies."""

import errno
import os
import signal
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascade import cli
from cascade.data import embeddings as module
from cascade.data.embeddings import Embeddings, Manifest
from cascade.data.precompute import (
    about_captions,
    about_pictures,
    caption_rows,
    picture_rows,
    precompute,
)
from cascade.data.transforms import BadSample
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError
from cascade.files import locks as claims_module
from cascade.files.locks import Claims
from tests.processes import Job
from tests.test_embeddings import write_clip, write_shards
from tests.test_text import write_t5


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_shards(tmp_path / "data")


ONE = Manifest("e", "0" * 16, {"clip_image": 2}, {"clip_image": "float32"})
NAMES = [f"train-{s:05d}" for s in range(3)]


def one_row(tar):
    return [tar.stem], {"clip_image": torch.ones(1, 2)}


def done(out):
    return sorted(path.stem for path in out.glob("*.safetensors"))


def until(condition):
    while not condition():
        time.sleep(0.01)


def share(data, out, notes, workers):
    """Makes rows, and goes on only when so many processes are making some."""

    def rows(tar):
        (notes / f"{tar.stem}.{os.getpid()}").touch()
        until(lambda: len({path.suffix for path in notes.iterdir()}) >= workers)
        return one_row(tar)

    precompute(data, out, ONE, rows)
    assert done(out) == NAMES


def test_where_all_is_there_nothing_is_written(data, tmp_path, monkeypatch):
    """Not even a claim: the place may be read-only."""

    def never(tar):
        raise AssertionError(tar)

    precompute(data, tmp_path / "out", ONE, one_row)
    monkeypatch.setattr("cascade.data.precompute.Claims", None)
    precompute(data, tmp_path / "out", ONE, never)
    with pytest.raises(UserError, match="holds rows of"):
        precompute(data, tmp_path / "out", replace(ONE, hash="1" * 16), never)


def stop_short(data, out, notes):
    """Holds the first shard, and never comes to an end."""

    def rows(tar):
        (notes / f"{tar.stem}.dies").touch()
        return signal.pause()

    precompute(data, out, ONE, rows)


def die_writing(data, out):
    """Dies in the middle of the second file."""

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "00001" in path.name:
            os.truncate(path, 20)
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save
    precompute(data, out, ONE, one_row)


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def test_two_processes_share_three_shards_and_make_each_once(data, notes, tmp_path):
    job = Job(share, (data, tmp_path / "out", notes, 2), out=tmp_path / "job", ranks=2)
    assert job.wait() == [0, 0], job.output()
    assert sorted(path.stem for path in notes.iterdir()) == NAMES
    assert len({path.suffix for path in notes.iterdir()}) == 2


def test_a_shard_whose_maker_dies_is_made_by_another_that_waits(data, notes, tmp_path):
    out = tmp_path / "out"
    first = Job(stop_short, (data, out, notes), out=tmp_path / "first")
    until(lambda: (notes / f"{NAMES[0]}.dies").exists())
    second = Job(share, (data, out, notes, 1), out=tmp_path / "second")
    until(lambda: done(out) == NAMES[1:])
    first.kill()
    assert first.wait() == [-signal.SIGKILL]
    assert second.wait() == [0], second.output()
    assert done(out) == NAMES


def test_a_call_goes_on_behind_one_that_was_killed_while_it_wrote(data, tmp_path):
    out = tmp_path / "out"
    assert Job(die_writing, (data, out), out=tmp_path / "job").wait() == [-signal.SIGKILL]
    assert done(out) == NAMES[:1]
    assert len(list(out.glob(".*.part"))) == 1
    before, seen = (out / f"{NAMES[0]}.safetensors").stat(), []
    precompute(data, out, ONE, one_row, lambda *progress: seen.append(progress))
    assert done(out) == NAMES
    assert (out / f"{NAMES[0]}.safetensors").stat() == before
    assert not list(out.glob(".*.part"))
    assert (seen[0], seen[-1]) == ((1, 3), (3, 3))


def test_a_failure_leaves_no_half_shard_and_no_claim(data, tmp_path):
    def rows(tar):
        if tar.stem == NAMES[1]:
            raise RuntimeError("out of memory")
        return one_row(tar)

    with pytest.raises(RuntimeError):
        precompute(data, tmp_path / "out", ONE, rows)
    assert done(tmp_path / "out") == NAMES[:1]
    precompute(data, tmp_path / "out", ONE, one_row)
    assert done(tmp_path / "out") == NAMES


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(data, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        save_file(tensors, path, metadata)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write to .*out: .*No space left") as caught:
        precompute(data, tmp_path / "out", ONE, one_row)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".claims",
        "manifest.json",
    ]


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(claims_module.fcntl, "lockf", refuse)
    monkeypatch.setattr(claims_module, "BEAT", 0.01)
    monkeypatch.setattr(claims_module, "SILENCE", 0.2)


def test_without_locks_files_claim_and_the_silent_are_taken_for_dead(data, tmp_path, no_locks):
    (tmp_path / "out").mkdir()
    dead = tmp_path / "out" / f".{NAMES[0]}.claim-0"
    dead.touch()
    made = []

    def rows(tar):
        made.append(tar.stem)
        with Claims(tmp_path / "out") as others, others.held(tar.stem, wait=False) as mine:
            assert not mine
        return one_row(tar)

    precompute(data, tmp_path / "out", ONE, rows)
    assert made == [*NAMES[1:], NAMES[0]]
    assert not list((tmp_path / "out").glob(".*.claim-*"))


def test_who_touches_a_claim_file_keeps_it(tmp_path, no_locks):
    with Claims(tmp_path) as claims, claims.held("x", wait=False) as mine:
        assert mine
        seen, since = None, time.monotonic()
        until(lambda: time.monotonic() - since > 2 * claims_module.SILENCE)
        with Claims(tmp_path) as others, others.held("x", wait=False) as theirs:
            assert not theirs
        files = claims_module.ClaimFiles(tmp_path, "x")
        seen = files.look()[0].touched
        until(lambda: files.look()[0].touched != seen)


def test_a_shard_of_which_nothing_is_good_has_no_rows_and_is_done(tmp_path):
    for name in ("clip", "t5"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in ("a.png", "a.json"):
            tar.addfile(tarfile.TarInfo(name))
    clip, t5 = (
        FrozenCLIP(str(write_clip(tmp_path / "clip"))),
        FrozenT5(str(write_t5(tmp_path / "t5"))),
    )
    kinds = (
        (about_pictures(clip), partial(picture_rows, clip=clip, captions=["txt"])),
        (about_captions(t5, ["txt"]), partial(caption_rows, encoder=t5, captions=["txt"])),
    )
    for n, (about, rows) in enumerate(kinds):
        precompute(tmp_path, tmp_path / str(n), about, rows)
        with pytest.raises(BadSample, match="no embedding"):
            Embeddings(tmp_path / str(n)).row("bad", "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "choose what to precompute: --clip CLIP or --text ENCODER"),
        (["--text", "ViT-L-14", "--length", "9"], "--length is not for a CLIP, which ViT-L-14 is"),
        (["--text", "nowhere"], "neither a directory nor in the local Hugging Face cache"),
        (["--clip", "nowhere"], "neither a directory nor a CLIP"),
    ],
)
def test_what_cannot_be_precomputed_is_said_in_one_line(data, options, words, capsys):
    assert cli.main(["data", "precompute", str(data), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (Path(data) / "text").exists()
