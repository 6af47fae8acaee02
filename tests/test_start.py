"""Fine-tuning: a run that begins with the weights of another."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade import cli
from cascade.config.compose import composed, differences, saved
from cascade.data.scenes.generate import write_scenes
from cascade.errors import UserError
from cascade.runs.run import Run
from cascade.runs.start import training
from cascade.stage import Stage
from cascade.training.checkpoint import newest_checkpoint
from cascade.training.provenance import recorded
from tests.small import SR

SMALL = ["images=16", "ema=0.5", "optim.lr=1e-2", "warmup=4"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    write_scenes(root / "shards", "plain", "train", 20, 16, seed=0, shard_size=10)
    data = f"data.path={root / 'shards'}"
    assert cli.main(["train", *SR, *SMALL, data, f"run={root / 'first'}"]) == 0
    return root / "first"


def tuned(begun, out, *more):
    return cli.main(["train", f"start={begun}", f"run={out}", *more])


def weights(run):
    return load_file(run / "weights.safetensors")


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_begins_with_the_weights_of_the_other_run(begun, tmp_path):
    assert tuned(begun, tmp_path / "kept", "optim.lr=0", "images=8") == 0
    assert same(begun, tmp_path / "kept")
    assert tuned(begun, tmp_path / "other", "images=8") == 0
    assert not same(begun, tmp_path / "other")
    # Fresh: the first step of the average and of the optimizer.
    assert json.loads((tmp_path / "other/status.json").read_text()) == {"images": 8, "total": 8}
    assert newest_checkpoint(tmp_path / "other").step == 2


def test_the_command_that_trained_it_begins_with_it_as_well(begun, tmp_path):
    """And finds the same numbers as without the architecture in the command."""
    data = f"data.path={Run(begun).config.data.path}"
    assert tuned(begun, tmp_path / "whole", *SR, *SMALL, data) == 0
    assert tuned(begun, tmp_path / "short") == 0
    assert same(tmp_path / "whole", tmp_path / "short")


def test_overrides_reach_what_they_reach_in_a_training(begun, tmp_path):
    config = training(
        [f"start={begun}", "run=x", "optim=muon", "optim.lr=0.5", "learning_rate=cosine",
         "images=64", "seed=5", "data.path=elsewhere", "net.net.blocks=2"]
    )  # fmt: skip
    assert config.stage.optimizer == config.optim
    assert (
        config.stage.optimizer
        == composed("train", ["optim=muon", "optim.lr=0.5", "data.path=x"]).optim
    )
    assert (config.stage.seed, config.data.seed) == (5, 5)
    assert (config.stage.learning_rate.total, config.stage.learning_rate.warmup) == (64, 4)
    assert config.data.path == "elsewhere"
    assert config.stage.net.net.blocks == 2
    assert config.stage.net.net.channels == 8
    assert config.start == str(begun)
    clip = training([f"start={begun}", "run=x", "clip.path=other"])
    assert clip.clip.path == "other"


@pytest.mark.parametrize(
    "choice",
    ["stage=clip", "stage=decoder_sketch", "experiment=karlo_decoder_tiny",
     *(pytest.param(f"stage={name}", marks=pytest.mark.slow)
       for name in ("prior", "prior_ar", "sr256_text"))],
)  # fmt: skip
def test_without_overrides_everything_is_as_in_the_other_run(choice, tmp_path):
    first = composed("train", [choice, "data.path=x", f"run={tmp_path / 'first'}", "optim.lr=3"])
    saved(first, tmp_path / "first/config.yaml")
    (tmp_path / "first/weights.safetensors").touch()
    second = training([f"start={tmp_path / 'first'}", "run=y"])
    paths = {line.split(":")[0] for line in differences(first, second)}
    assert paths == {"run", "start"}


def test_its_origin_is_recorded_and_kept(begun, tmp_path):
    assert tuned(begun, tmp_path / "run", "images=8") == 0
    hash = recorded(newest_checkpoint(tmp_path / "run"))["start"]
    assert len(hash) == 16
    assert recorded(newest_checkpoint(begun)).get("start") is None
    assert tuned(begun, tmp_path / "run", "images=12") == 0
    assert recorded(newest_checkpoint(tmp_path / "run"))["start"] == hash
    assert Run(tmp_path / "run").config.start == str(begun)


def test_a_killed_fine_tuning_equals_one_never_killed(begun, tmp_path, monkeypatch):
    class Killed(BaseException):
        """No `except Exception` stops it."""

    step, save = Stage.training_step, ["save_seconds=0.0"]

    def training_step(self, batch, number):
        if number == 2:
            raise Killed
        return step(self, batch, number)

    assert tuned(begun, tmp_path / "whole", *save) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        with pytest.raises(Killed):
            tuned(begun, tmp_path / "killed", *save)
    assert newest_checkpoint(tmp_path / "killed").step == 2
    assert tuned(begun, tmp_path / "killed", *save) == 0
    assert same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["net.net.channels=16"], "weights.safetensors does not hold the weights of"),
        (["stage=decoder_text", "data.path=x"], ""),
    ],
)
def test_another_architecture_is_refused(more, message, begun, tmp_path, capfd):
    if "data.path=x" in more:
        more = [*more[:1], f"data.path={Run(begun).config.data.path}", "size=16"]
    assert tuned(begun, tmp_path / "run", *more) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Run(tmp_path / "run").weights


def test_a_run_cannot_begin_with_itself_or_with_nothing(begun, tmp_path):
    with pytest.raises(UserError, match="is the run itself"):
        training([f"start={begun}", f"run={begun}"])
    with pytest.raises(UserError, match="keeps the size of that run: leave size= out"):
        training([f"start={begun}", f"run={tmp_path / 'new'}", "size=32"])
    with pytest.raises(UserError, match="no weights there"):
        training([f"start={tmp_path}", "run=x"])


def test_another_origin_is_another_run(begun, tmp_path, capfd):
    assert tuned(begun, tmp_path / "run", "images=8") == 0
    other = tmp_path / "second"
    other.mkdir()
    (other / "config.yaml").write_bytes((begun / "config.yaml").read_bytes())
    changed = {key: value + 1 for key, value in weights(begun).items()}
    save_file(changed, other / "weights.safetensors", {"encoders": "[]"})
    assert tuned(other, tmp_path / "run", "images=12") == 2
    assert "another configuration: start" in capfd.readouterr().err
