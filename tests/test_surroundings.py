"""A run goes on with the shards and the encoders that it began with, or not at all."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade.data.scenes import write_scenes
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.errors import UserError
from cascade.training.checkpoint import CheckpointFolders
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
    assert train.load(tmp_path / "run").encoders
    go(16)
    write_clip(tmp_path / "clip", 1)
    with pytest.raises(UserError, match="trained with another encoder"):
        train.load(tmp_path / "run")


def test_the_same_weights_with_another_activation_are_another_encoder(go, tmp_path):
    path = tmp_path / "clip/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="clip is another encoder than when this run began"):
        go(16)


def test_an_encoder_that_was_exchanged_is_refused(go, tmp_path):
    write_clip(tmp_path / "clip", 1)
    with pytest.raises(UserError, match="clip is another encoder than when this run began"):
        go(16)
    write_clip(tmp_path / "clip", 0)
    go(16)
