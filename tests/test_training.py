"""Trainings on real shards: resumption, invariances, what a run leaves behind, refusals."""

import copy
import csv
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cascade.config.compose import built, composed, saved
from cascade.data import loading
from cascade.data.loading import loader
from cascade.data.scenes.generate import write_scenes
from cascade.data.shards import Shards
from cascade.encoders.clip import save_clip
from cascade.errors import UserError
from cascade.runs.progress import bar
from cascade.runs.run import Run
from cascade.stage import Stage
from cascade.training import fit
from cascade.training.callbacks import history
from tests import small

SMALL = [*small.SR, "ema=0.9"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 20), ("val", 8)):
        write_scenes(folder, "plain", split, count, 32, seed=0, shard_size=10)
    return folder


@pytest.fixture
def config(shards, tmp_path):
    def make(*overrides, run="run"):
        return composed(
            "train", [*SMALL, f"data.path={shards}", f"run={tmp_path / run}", *overrides]
        )

    return make


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "weights.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    pass


def interrupted_after(monkeypatch, step):
    """The next run saves at `step` and dies at the one after."""
    save = fit.Checkpoints.on_train_batch_end

    def die(self, trainer, module, *args):
        if trainer.global_step == step:
            self.save(trainer, module)
        if trainer.global_step == step + 1:
            raise Stop
        save(self, trainer, module, *args)

    monkeypatch.setattr(fit.Checkpoints, "on_train_batch_end", die)


@pytest.mark.slow  # `test_resume.py` has all but the grids
def test_a_killed_run_equals_an_unkilled_one(config, monkeypatch):
    whole = fit.train(config("images=48", "grids=3", run="whole"))
    with monkeypatch.context() as patch:
        interrupted_after(patch, 5)
        with pytest.raises(Stop):
            fit.train(config("images=48", "grids=3", run="killed"))
    killed = fit.train(config("images=48", "grids=3", run="killed"))
    assert equal(weights(whole), weights(killed))
    rows = [list(csv.DictReader((run / "metrics.csv").open())) for run in (whole, killed)]
    assert rows[0][-1]["images"] == rows[1][-1]["images"] == "48"
    grids = [sorted(path.name for path in (run / "samples").iterdir()) for run in (whole, killed)]
    assert grids[0] == grids[1]


def test_the_loss_falls_and_a_run_is_complete(config):
    folder = fit.train(config("images=400", "optim.lr=3e-3", "grids=2"))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert json.loads((folder / "status.json").read_text()) == {"images": 400, "total": 400}
    assert len(list((folder / "checkpoints").iterdir())) <= 2
    assert len(list((folder / "samples").glob("0*.png"))) == 2
    for name in ("config.yaml", "tensorboard", "samples/truth.png"):
        assert (folder / name).exists(), name
    loaded = Run(folder).load()
    assert not loaded.training
    assert equal(dict(loaded.state_dict()), weights(folder))


def test_the_share_of_waiting_for_data_is_told(config, monkeypatch, capfd):
    """By a clock on which a sample takes 3 s to read, and its step 4."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    item, step = Shards.item, Stage.training_step

    def read(*args):
        clock.now += 3
        return item(*args)

    def trained(self, batch, number):
        clock.now += 4 * len(batch["sample"])
        return step(self, batch, number)

    for module in (loading, history):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Shards, "item", read)
    monkeypatch.setattr(Stage, "training_step", trained)
    folder = fit.train(config("images=160"))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["waiting"] for row in rows] == ["0.429", "0.429"]  # 3 / 7
    assert "43% of the time waiting for data" in capfd.readouterr().err


def test_a_finished_run_is_passed_over_and_another_configuration_refused(config):
    folder = fit.train(config("images=8"))
    before = (folder / "weights.safetensors").stat().st_mtime_ns
    fit.train(config("images=8"))
    assert (folder / "weights.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"net\.net\.channels: 8 -> 16"):
        fit.train(config("images=8", "net.net.channels=16"))
    with pytest.raises(UserError, match=r"optim\.lr"):
        fit.train(config("images=16", "optim.lr=1"))


def test_a_log_file_gets_lines_now_and_then(capsys, monkeypatch):
    with bar("decoder") as progress:
        task = progress.add_task("", total=4000, rate=0, note="")
        for done in range(1000, 4001, 1000):
            progress.update(task, completed=done, rate=500.0, note="loss 0.25")
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith(" decoder: 1,000/4,000 images, 500.0/s, 0:00:06 left, loss 0.25")
    assert last.endswith(" decoder: 4,000/4,000 images, 500.0/s, 0:00:00 left, loss 0.25")
    with bar("decoder") as progress:  # the last batch goes past the end
        task = progress.add_task("", total=4000, rate=0, note="")
        progress.update(task, completed=4032, rate=5.0)
    assert capsys.readouterr().err.endswith("4,032/4,000 images, 5.0/s, 0:00:00 left\n")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    with bar("decoder") as progress:
        progress.add_task("", total=10, rate=0, note="")
    assert "\x1b[" in capsys.readouterr().err


def test_accumulation_changes_nothing(config):
    a = weights(fit.train(config("images=16", run="a")))
    b = weights(fit.train(config("images=16", "micro_batch=2", run="b")))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-5, rtol=1e-3)


def test_a_batch_is_shared_among_ranks_and_accumulated():
    assert fit.accumulation(64, None, 1) == (64, 1)
    assert fit.accumulation(64, None, 4) == (16, 1)
    assert fit.accumulation(64, 8, 2) == (8, 4)
    for batch, micro_batch, ranks in ((64, 24, 1), (64, None, 3), (8, 8, 2)):
        with pytest.raises(UserError, match=rf"batch={batch} is not ranks \({ranks}\)"):
            fit.accumulation(batch, micro_batch, ranks)


def test_weights_of_another_configuration_are_refused(config):
    folder = fit.train(config("images=8"))
    other = built(config("net.net.channels=16").stage)
    with pytest.raises(UserError, match=r"conv_in.weight is \[8, .*, not \[16, "):
        other.restore(folder)
    with pytest.raises(UserError, match="train it first"):
        other.restore(folder / "nowhere")


def stage_and_batch(config, count=6):
    options = config()
    stage = built(options.stage)
    for p in stage.net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = next(iter(loader(built(options.data), count, batches=1)))
    return stage.eval(), batch


def rows(batch, index):
    return {
        k: v[index] if isinstance(v, torch.Tensor) else [v[i] for i in index]
        for k, v in batch.items()
        if k != "skipped"
    }


def test_a_sample_is_the_same_whatever_the_batch(config):
    stage, batch = stage_and_batch(config)
    together = stage.sample(batch, seed=3)
    for i in range(6):
        alone = stage.sample(rows(batch, [i]), seed=3)
        torch.testing.assert_close(alone[0], together[i], atol=1e-3, rtol=0)
    assert (stage.sample(batch, seed=4) - together).abs().max() > 1e-2


def test_the_loss_of_a_sample_is_the_same_whatever_the_batch(config):
    stage, batch = stage_and_batch(config)
    together = stage.loss(batch)
    picked = [4, 1]
    torch.testing.assert_close(stage.loss(rows(batch, picked)), together[picked])


def test_a_sketch_is_trained_on_the_picture_itself(config):
    """To the least squares, that is to the mean picture, whatever the noise."""
    stage, batch = stage_and_batch(config)
    plain = stage.loss(batch)
    sketch = torch.randn(6, 3, 16, 16, requires_grad=True)
    conditioner = stage.conditioner.forward
    stage.conditioner.forward = lambda *args: replace(conditioner(*args), sketch=sketch)
    loss = stage.loss(batch)
    x0 = stage.codec.encode(batch)
    torch.testing.assert_close(loss - plain, (sketch - x0).square().mean((1, 2, 3)))


def test_super_resolution_enlarges_pictures_larger_than_its_crops(config):
    stage, batch = stage_and_batch(config)
    big = {**batch, "image_8": torch.randn(6, 3, 16, 24)}
    assert stage.sample(big, seed=0).shape == (6, 3, 32, 48)


def test_training_leaves_the_batch_as_it_is(config):
    stage, batch = stage_and_batch(config)
    before = copy.deepcopy(batch)
    stage.loss(batch)
    assert all(torch.equal(before[k], batch[k]) for k in ("image_8", "image_16"))


def test_a_model_can_be_moved_but_not_given_another_clip(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    prior = composed("train", ["stage=prior", "data.path=none", f"clip.path={old / 'clip'}"])
    clip = built(prior.clip.model)
    save_clip(clip, clip.build(), old / "clip")
    built(prior.stage).export(old / "prior")
    saved(prior, old / "prior" / "config.yaml")
    old.rename(new)
    moved = Run(new / "prior").load()
    assert moved.encoded({"caption": ["a red circle"]})["clip_text"].shape == (1, clip.dim)
    save_clip(clip, clip.build(), new / "clip")
    with pytest.raises(UserError, match="another encoder"):
        Run(new / "prior").load()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_NTASKS": "4"}, []),  # srun --ntasks=4, or none at all in such an allocation
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, ["trainer.devices=2"]),
        ({"SLURM_NTASKS": "1"}, ["trainer.devices=4"]),
    ],
)
def test_other_processes_than_the_trainer_is_told_of_are_refused(
    variables, told, tmp_path, monkeypatch
):
    for key in [key for key in os.environ if key.startswith("SLURM")]:
        monkeypatch.delenv(key)
    for key, value in {"SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", **variables}.items():
        monkeypatch.setenv(key, value)
    config = composed("train", ["data.path=none", f"run={tmp_path / 'run'}", *told])
    with pytest.raises(
        UserError, match=r"srun --nodes=1 --ntasks-per-node=\d and trainer"
    ) as error:
        fit.train(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
