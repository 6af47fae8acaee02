"""A run goes on with the shards and the encoders that it began with, or not at all."""

import hashlib
import json
import os
import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.data.shards import Shards
from cascade.data.tars.dataset import index_folder
from cascade.data.transforms import Pictures
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.errors import UserError
from cascade.eval.cascades.held_out import check_unseen
from cascade.runs.run import Run
from cascade.training import fit, provenance
from cascade.training.callbacks import grids
from cascade.training.checkpoint import CheckpointFolders, newest_checkpoint
from cascade.training.provenance import as_begun, recorded
from tests import small
from tests.test_shards import sample, write

SMALL = small.DECODER


def write_clip(folder, seed):
    torch.manual_seed(seed)
    architecture = built(composed("train", [*SMALL, "data.path=none"]).clip.model)
    save_clip(architecture, architecture.build(), folder)


@pytest.fixture
def go(tmp_path):
    write_scenes(tmp_path / "shards", "plain", "train", 20, 16, seed=0, shard_size=10)
    write_clip(tmp_path / "clip", 0)

    def run(images, root=tmp_path, data="shards", clip="clip"):
        own = [f"data.path={root / data}", f"clip.path={root / clip}"]
        own += [f"run={root / 'run'}", f"images={images}", "learning_rate=constant"]
        return fit.train(composed("train", [*SMALL, *own]))

    run(8)
    return run


def test_a_run_goes_on_where_all_is_as_it_was(go, tmp_path):
    go(16)
    assert '"images": 16' in (tmp_path / "run/status.json").read_text()


def test_a_folder_of_shards_that_grew_is_refused(go, tmp_path):
    shutil.copy(tmp_path / "shards/train-00001.tar", tmp_path / "shards/train-00002.tar")
    with pytest.raises(UserError, match="the shards differ"):
        go(16)
    (tmp_path / "shards/train-00002.tar").unlink()
    go(16)


def test_a_tar_of_as_many_larger_pictures_is_refused(go, tmp_path):
    tar = tmp_path / "shards/train-00001.tar"
    kept = tar.read_bytes()
    write_scenes(tmp_path / "others", "plain", "train", 20, 128, seed=1, shard_size=10)
    shutil.copy(tmp_path / "others/train-00001.tar", tar)
    with pytest.raises(UserError, match="the shards differ"):
        go(16)
    tar.write_bytes(kept)
    go(16)


def noted_before(run, old, new):
    """Makes a run's files as a version left them that noted the hash of the weights alone."""
    file = run / "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        noted = opened.metadata()
    assert json.loads(noted["encoders"]) == [new]
    save_file(load_file(file), file, {"encoders": json.dumps([old])})
    for folder in (run / "checkpoints").iterdir():
        state = torch.load(folder / "state.pt", weights_only=True)
        assert list(state["surroundings"]["encoders"].values()) == [new]
        state["surroundings"]["encoders"] = dict.fromkeys(state["surroundings"]["encoders"], old)
        shutil.rmtree(folder)
        CheckpointFolders().save_checkpoint(state, folder)


def test_a_run_of_a_version_that_hashed_the_weights_alone_goes_on(go, tmp_path):
    clip = FrozenCLIP(str(tmp_path / "clip"))
    weights = (tmp_path / "clip/open_clip_model.safetensors").read_bytes()
    noted_before(tmp_path / "run", sha256(weights).hexdigest()[:16], clip.hash)
    assert Run(tmp_path / "run").load().encoders
    go(16)
    write_clip(tmp_path / "clip", 1)
    with pytest.raises(UserError, match="trained with another encoder"):
        Run(tmp_path / "run").load()


def test_the_same_weights_with_another_activation_are_another_encoder(go, tmp_path):
    path = tmp_path / "clip/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="clip differs from the encoder that this run began with"):
        go(16)


def test_an_encoder_that_was_exchanged_is_refused(go, tmp_path):
    write_clip(tmp_path / "clip", 1)
    with pytest.raises(UserError, match="clip differs from the encoder that this run began with"):
        go(16)
    write_clip(tmp_path / "clip", 0)
    go(16)


def images(root):
    return json.loads((root / "run/status.json").read_text())["images"]


def moved(tmp_path):
    """All of it, elsewhere."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    for name in ("shards", "clip", "run"):
        (tmp_path / name).rename(place / name)
    return place


def test_what_lies_elsewhere_or_is_named_in_another_way_is_the_same(go, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    go(12, data="linked")
    go(16, Path(), "./shards/")
    place = moved(tmp_path)
    go(20, place)
    assert images(place) == 20
    shutil.copytree(place / "shards", tmp_path / "shards")  # with the times of today
    for tar in (tmp_path / "shards").glob("*.tar"):
        os.utime(tar, (1, 1))
    shutil.copytree(place / "clip", tmp_path / "clip")
    shutil.copytree(place / "run", tmp_path / "run")
    go(24)
    assert images(tmp_path) == 24


def test_what_lies_elsewhere_and_is_another_is_refused(go, tmp_path):
    place = moved(tmp_path)
    write_clip(place / "clip", 1)
    with pytest.raises(UserError, match="clip differs from the encoder that this run began with"):
        go(16, place)
    write_clip(place / "clip", 0)
    write_clip(place / "other", 1)
    with pytest.raises(UserError, match=r"another configuration: clip\.path"):
        go(16, place, clip="other")
    shutil.copytree(place / "clip", place / "same")
    go(16, place, clip="same")
    assert images(place) == 16


def test_an_index_knows_shards_by_their_content(go, tmp_path):
    shards = tmp_path / "shards"
    index_folder(shards, lambda *_: None)
    go(12)  # begun without one
    for number in (1, 0):  # in their order, under other names
        (shards / f"train-0000{number}.tar").rename(shards / f"train-1000{number}.tar")
    index_folder(shards, lambda *_: None)
    go(16)
    a, b = (shards / f"train-1000{n}.tar" for n in (0, 1))
    other, time = bytearray(b.read_bytes()), b.stat()
    at = other.index(b"IDAT") + 20
    other[at] ^= 1
    b.write_bytes(other)
    os.utime(b, ns=(time.st_atime_ns, time.st_mtime_ns))  # as large, as old, as many samples
    (shards / "train-10001.index").unlink()
    index_folder(shards, lambda *_: None)
    with pytest.raises(UserError, match="the shards differ"):
        go(20)
    other[at] ^= 1
    b.write_bytes(other)
    index_folder(shards, lambda *_: None)
    go(20)
    assert images(tmp_path) == 20
    assert a.exists()


def test_a_run_keeps_what_is_held_out_since_it_began_and_is_not_measured_with_it(go, tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    index_folder(shards, lambda *_: None, val="25%")
    go(12)
    kept = recorded(newest_checkpoint(run))
    assert kept["held_out"] == 0
    with pytest.raises(UserError, match=r"trained on .* now holds out.*--split all"):
        check_unseen([run], shards, "val")
    shutil.rmtree(run)
    go(12)
    assert recorded(newest_checkpoint(run))["held_out"] == 0.25
    check_unseen([run], shards, "val")
    index_folder(shards, lambda *_: None, val="50%")
    go(16)
    assert recorded(newest_checkpoint(run))["held_out"] == 0.25
    with pytest.raises(UserError, match="now holds out"):
        check_unseen([run], shards, "val")


@pytest.mark.parametrize("held_out", [True, False])
def test_grids_show_what_is_held_out_or_are_labelled(tmp_path, held_out, monkeypatch):
    write_scenes(tmp_path / "shards", "plain", "train", 20, 16, seed=0)
    (tmp_path / "shards/train-00000.tar").rename(tmp_path / "shards/00000.tar")
    write_clip(tmp_path / "clip", 0)
    if held_out:
        index_folder(tmp_path / "shards", lambda *_: None, val="40%")
    own = [f"data.path={tmp_path / 'shards'}", f"clip.path={tmp_path / 'clip'}", "grids=1"]
    own += [f"run={tmp_path / 'run'}", "images=4", "learning_rate=constant"]
    seen = []

    def noted(pictures, columns, captions, scale):
        seen.append(captions)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(grids, "grid", noted)
    fit.train(composed("train", [*SMALL, *own]))
    split = "val" if held_out else "train"
    shards = Shards(tmp_path / "shards", Pictures(()), split, shuffle=False)
    label = "" if held_out else "training: "
    assert seen[0] == seen[-1]
    assert seen[0] == [label + shards[n]["caption"] for n in range(len(shards))][:16]


def test_a_run_begun_before_names_were_read_keeps_all_its_tars(tmp_path, monkeypatch):
    """`train_0` and `val_0` had no split once, and so were trained on together."""
    rows = ""
    for name, count in (("train_0", 3), ("val_0", 2)):
        tar = write(tmp_path / f"{name}.tar", [m for i in range(count) for m in sample(str(i), i)])
        rows += f"{(tar.name, tar.stat().st_size, count)}\n"
    then = {"encoders": {}, "shards": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    make = partial(Shards, tmp_path, Pictures(()))
    assert len(as_begun(None, make)) == 3
    monkeypatch.setattr(provenance, "recorded", lambda checkpoint: then)
    assert len(as_begun(None, make)) == 5
    then["shards"] = "another"
    assert len(as_begun(None, make)) == 3
