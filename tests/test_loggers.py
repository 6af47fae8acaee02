"""Trainings are logged where the configuration says; packages are stand-ins (`made_loggers`)."""

import csv
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from cascade.cli import main
from cascade.config.compose import composed
from cascade.data.scenes.generate import write_scenes
from cascade.errors import UserError
from cascade.runs.run import Position, Run
from cascade.training import fit
from cascade.training.callbacks.logging import Logging
from cascade.training.loggers.logger import _installed, without_secrets
from cascade.training.loggers.tensorboard import TensorBoard
from tests import made_loggers, small

CANARY = "canary-0123456789"
NAMES = ("wandb", "trackio", "mlflow")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        write_scenes(folder, "plain", split, 8, 32, seed=0, shard_size=8)
    return folder


@pytest.fixture
def config(shards, tmp_path):
    def make(*overrides):
        where = [f"data.path={shards}", f"run={tmp_path / 'run'}"]
        return composed("train", [*small.SR, "ema=0.9", *where, *overrides])

    return make


class Stop(Exception):
    pass


def stopped(monkeypatch, saved, stop):
    """The next run saves at one step and dies after a later one was reported."""
    of = fit.Checkpoints.on_train_batch_end

    def die(self, trainer, module, *args):
        of(self, trainer, module, *args)
        if trainer.global_step == saved:
            self.save(trainer, module)
        if trainer.global_step == stop:
            raise Stop

    monkeypatch.setattr(fit.Checkpoints, "on_train_batch_end", die)


def chosen(*overrides):
    return list(composed("train", ["data.path=none", *overrides]).logger)


def test_one_or_several_loggers_are_chosen():
    assert chosen() == ["tensorboard"]
    assert chosen("logger=wandb") == ["wandb"]
    assert chosen("logger=csv") == []
    assert chosen("logger=[csv,wandb]") == ["wandb"]
    assert chosen("logger=[tensorboard,mlflow,trackio]") == ["tensorboard", "mlflow", "trackio"]


def test_a_run_of_an_earlier_version_uses_tensorboard():
    (found,) = fit._loggers(OmegaConf.create({"seed": 0})).values()
    assert isinstance(found, TensorBoard)


def test_an_interrupted_run_is_logged_as_one(config, monkeypatch, tmp_path):
    """Each row of metrics.csv once, each grid, the configuration, the metrics, and no secret."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(fit, "History", partial(fit.History, every=1))
    # TensorBoard orders files of one second and one process by this number, as text.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    told = {name: getattr(made_loggers, name)(monkeypatch) for name in NAMES}
    mine = ["images=24", "grids=2", "logger=[tensorboard,wandb,trackio,mlflow]"]
    mine += [f"+launcher_note='https://me:{CANARY}@host/a?token={CANARY}'"]
    with monkeypatch.context() as patch:
        stopped(patch, 2, 4)
        with pytest.raises(Stop):
            fit.train(config(*mine))
    folder = fit.train(config(*mine))
    with (folder / "metrics.csv").open() as file:
        rows = {int(row["images"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert list(rows) == [4, 8, 12, 16, 20, 24]
    for name, service in told.items():
        assert len(service.ids) == 2, name
        assert len(set(service.ids)) == 1, name
        assert [step for step, _ in service.scalars] == list(rows), name
        losses = [values["loss"] for _, values in service.scalars]
        np.testing.assert_allclose(losses, list(rows.values()), rtol=1e-4)
        assert [(n, key) for n, key, _ in service.pictures] == [
            *((0, "truth"), (12, "samples"), (24, "samples")),
        ], name
        shown = np.asarray(Image.open(folder / "samples/0000000024.png").convert("RGB"))
        np.testing.assert_array_equal(np.asarray(service.pictures[-1][2]), shown)
        assert service.configs[0]["images"] == 24
        assert service.configs[0]["launcher_note"] == "https://host/a"
        assert [file.endswith("metrics.csv") for file in service.files] == [True], name
        assert CANARY not in "".join(service.said), name
    assert told["wandb"].ends == [1, None]
    assert told["mlflow"].ends == ["KILLED", "FINISHED"]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(rows)
    assert [event.step for event in board.Images("samples")] == [12, 24]
    assert {"config/text_summary", "metrics/text_summary"} <= {*board.Tags()["tensors"]}
    logged = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert CANARY.encode() not in logged


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, capsys, shards):
    if _installed("wandb"):
        pytest.skip("wandb is not missing here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # which wandb leaves, and which is no package
    asked = [f"data.path={shards}", "run=run", "logger=wandb"]
    assert main(["train", *small.SR, *asked]) == 2
    assert "pip install 'cascade-diffusion[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def logging(tmp_path, **loggers):
    return Logging(tmp_path, loggers, {"a": 1}, Position(0, 4))


def trainer(first=True, step=0):
    return SimpleNamespace(is_global_zero=first, global_step=step, max_steps=5)


class Recorder:
    package = None

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []

    def _called(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise OSError(f"https://user:{CANARY}@host is not there")

    def begin(self, run, config, images, known):
        self._called("begin")

    def scalars(self, values, images):
        self._called("scalars")

    def picture(self, name, sheet, images):
        self._called("picture")

    def end(self, finished):
        self._called("end")


def test_only_the_first_rank_logs(tmp_path):
    one = Recorder()
    log = logging(tmp_path, one=one)
    log.setup(trainer(first=False), None, "fit")
    log.scalars({"loss": 1.0}, 4)
    log.teardown(trainer(first=False), None, "fit")
    assert one.calls == []


def test_a_logger_that_fails_is_dropped_and_the_others_go_on(tmp_path, capsys):
    bad, good = Recorder("scalars"), Recorder()
    log = logging(tmp_path, bad=bad, good=good)
    log.setup(trainer(), None, "fit")
    for images in (4, 8):
        log.scalars({"loss": 1.0}, images)
    log.teardown(trainer(step=5), None, "fit")
    assert bad.calls == ["begin", "scalars"]
    assert good.calls == ["begin", "scalars", "scalars", "end"]
    said = capsys.readouterr().out + Run(tmp_path).events.read_text()
    assert "logger=bad failed (OSError: https://host is not there)" in said
    assert CANARY not in said


def test_a_logger_that_cannot_begin_ends_the_run(tmp_path):
    log = logging(tmp_path, bad=Recorder("begin"))
    with pytest.raises(UserError, match=r"^logger=bad failed \(OSError: https://host is") as error:
        log.setup(trainer(), None, "fit")
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("s3://key:secret@bucket/a-{0..9}.tar", "s3://bucket/a-{0..9}.tar"),
        ("https://host/a.tar?X-Signature=secret#secret", "https://host/a.tar"),
        ("pipe:curl -H 'Authorization: secret' host", "pipe:..."),
        (
            "cannot reach http://me:secret@host:50/x?y=secret now",
            "cannot reach http://host:50/x now",
        ),
        ("see secret-secret", "see ..."),
        ("runs/a@b?c#d", "runs/a@b?c#d"),
        (3, 3),
    ],
)
def test_secrets_are_left_out(told, kept, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret-secret")
    assert without_secrets({"a": [told]}) == {"a": [kept]}


def test_a_key_has_no_place_in_the_configuration(config):
    with pytest.raises(UserError) as error:
        fit.train(config("logger=wandb", f"+logger.wandb.api_key={CANARY}"))
    assert CANARY not in str(error.value)
