"""A run goes on with the shards and the encoders that it began with, or not at all."""

import shutil

import pytest
import torch

from cascade.data.scenes import write_scenes
from cascade.encoders.clip import save_clip
from cascade.errors import UserError
from cascade.verbs import train
from cascade.verbs.configuration import built, composed

SMALL = ["stage=decoder_text", "text=clip_tiny", "size=16", "batch=4", "warmup=8", "grids=0"]
SMALL += ["net.channels=8", "net.embed=16", "net.blocks=1", "net.width=32", "net.head_channels=8"]
SMALL += ["clip.model.text_width=16", "clip.model.text_layers=1", "clip.model.vision_width=8"]


def write_clip(folder, seed):
    torch.manual_seed(seed)
    architecture = built(composed("train", [*SMALL, "data.path=none"]).clip.model)
    save_clip(architecture, architecture.build(), folder)


@pytest.fixture
def go(tmp_path):
    write_scenes(tmp_path / "shards", "plain", "train", 20, 16, seed=0, shard_size=10)
    write_clip(tmp_path / "clip", 0)

    def run(images):
        own = [f"data.path={tmp_path / 'shards'}", f"clip.path={tmp_path / 'clip'}"]
        own += [f"run={tmp_path / 'run'}", f"images={images}", "learning_rate=constant"]
        return train.run(composed("train", [*SMALL, *own]))

    run(8)
    return run


def test_a_run_goes_on_where_all_is_as_it_was(go, tmp_path):
    go(16)
    assert '"images": 16' in (tmp_path / "run/status.json").read_text()


def test_a_folder_of_shards_that_grew_is_refused(go, tmp_path):
    shutil.copy(tmp_path / "shards/train-00001.tar", tmp_path / "shards/train-00002.tar")
    with pytest.raises(UserError, match="shards are others"):
        go(16)
    (tmp_path / "shards/train-00002.tar").unlink()
    go(16)


def test_a_tar_of_as_many_larger_pictures_is_refused(go, tmp_path):
    tar = tmp_path / "shards/train-00001.tar"
    kept = tar.read_bytes()
    write_scenes(tmp_path / "others", "plain", "train", 20, 128, seed=1, shard_size=10)
    shutil.copy(tmp_path / "others/train-00001.tar", tar)
    with pytest.raises(UserError, match="shards are others"):
        go(16)
    tar.write_bytes(kept)
    go(16)


def test_an_encoder_that_was_exchanged_is_refused(go, tmp_path):
    write_clip(tmp_path / "clip", 1)
    with pytest.raises(UserError, match="clip has other weights than when this run began"):
        go(16)
    write_clip(tmp_path / "clip", 0)
    go(16)
