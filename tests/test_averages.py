"""Averages whose length is chosen after training, against sums over the weights of all steps."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from cascade import cli
from cascade.data.scenes.generate import write_scenes
from cascade.errors import UserError
from cascade.runs.averages import Profile, exponent, mixture, reconstructed
from cascade.runs.model import load_cascade
from cascade.runs.run import Position, Run
from cascade.stage import Stage
from cascade.training.callbacks.averages import PowerAverages
from cascade.training.callbacks.ema import EMA
from cascade.training.callbacks.saving import Checkpoints
from tests.small import SR

STEPS = 640
KEPT = ["averages=power", "+averages.snapshots=5"]


def shares(length, steps=STEPS):
    """The weight of each step in a power-function average: k^gamma, integrated over each step."""
    ends = (np.arange(steps + 1) / steps) ** (exponent(length) + 1)
    return np.diff(ends)


@pytest.mark.parametrize(
    ("length", "gamma"), [(0.05, 16.972198602303447), (0.1, 6.937203937601809)]
)
def test_a_length_is_the_standard_deviation_of_its_profile(length, gamma):
    assert exponent(length) == pytest.approx(gamma, rel=1e-9)
    places = (np.arange(10**5) + 0.5) / 10**5
    weights = shares(length, 10**5)
    mean = (weights * places).sum()
    assert (weights * (places - mean) ** 2).sum() ** 0.5 == pytest.approx(length, rel=1e-4)


def test_the_products_of_profiles_are_their_integrals():
    x = (np.arange(10**6) + 0.5) / 10**6
    one, other = Profile(0.7, 5.5), Profile(1.0, 2.0)
    densities = [
        (x < p.step) * (p.gamma + 1) * (x / p.step) ** p.gamma / p.step for p in (one, other)
    ]
    assert one.product(other) == pytest.approx((densities[0] * densities[1]).mean(), rel=1e-5)
    assert one.product(other) == other.product(one)


def walked(folder, snapshots=32):
    """A run of random steps of one weight, with snapshots; returns the weight after each step."""
    module, values = nn.Linear(1, 1, bias=False), []
    ema, random = EMA(), np.random.default_rng(0)
    kept = PowerAverages(folder, ema, Position(0, 4), STEPS * 4, snapshots=snapshots)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    for callback in (ema, kept):
        callback.on_fit_start(trainer, module)
    for step in range(1, STEPS + 1):
        values.append(3 + 2 * step / STEPS + random.normal())
        nn.init.constant_(module.weight, values[-1])
        module.weight.grad = torch.ones_like(module.weight)
        ema.on_before_optimizer_step(trainer, module, None)
        trainer.global_step = step
        for callback in (ema, kept):
            callback.on_train_batch_end(trainer, module, None, None, step)
    return kept, np.array(values)


def test_any_length_is_close_to_the_sum_over_all_steps(tmp_path):
    kept, values = walked(tmp_path)
    for length in (0.05, 0.1):  # those that were kept, which are exact
        own = kept.averages[f"{length:g}"]["weight"].item()
        assert own == pytest.approx(values @ shares(length), rel=1e-5)
        assert reconstructed(Run(tmp_path), length)["weight"].item() == pytest.approx(own, rel=1e-5)
    for length in (0.03, 0.07, 0.14, 0.2, 0.25):
        found = reconstructed(Run(tmp_path), length)["weight"].item()
        weights = shares(length)
        assert abs(found - values @ weights) < 0.006  # weights scatter by 1 and drift by 2
        others = [values @ shares(length * by) for by in (0.9, 1.1)]  # what others would give
        assert max(abs(found - other) for other in others) > 0.012


def test_the_mixture_is_the_best_of_all(tmp_path):
    """Against a fit of the profiles at many points."""
    kept = [Profile(s, exponent(n)) for n in (0.05, 0.1) for s in (0.25, 0.5, 0.75, 1)]
    wanted = Profile(1, exponent(0.15))
    x = (np.arange(20_000) + 0.5) / 20_000
    density = lambda p: (x < p.step) * (p.gamma + 1) / p.step * (x / p.step) ** p.gamma  # noqa: E731
    rows, goal = np.stack([density(p) for p in kept], 1), density(wanted)
    weights, distance = mixture(kept, wanted)
    assert sum(weights) == pytest.approx(1)
    off = np.linalg.norm(rows @ weights - goal) / np.linalg.norm(goal)
    assert distance == pytest.approx(off, rel=1e-3)
    # The same fit with the first weight as one less the others.
    free = np.linalg.lstsq(rows[:, 1:] - rows[:, :1], goal - rows[:, 0])[0]
    np.testing.assert_allclose(weights[1:], free, atol=2e-3)


@pytest.mark.parametrize(
    ("length", "snapshots", "message"),
    [
        (0.0, 32, "give a share of the training"),
        (0.5, 32, "give a share of the training"),
        (0.02, 4, "would be off by"),
    ],
)
def test_lengths_that_cannot_be_made_are_refused(length, snapshots, message, tmp_path):
    walked(tmp_path, snapshots)
    with pytest.raises(UserError, match=message):
        reconstructed(Run(tmp_path), length)


def test_a_damaged_snapshot_is_named(tmp_path):
    walked(tmp_path)
    _, path = Run(tmp_path).snapshots()[3]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{path.name} .*cut short"):
        reconstructed(Run(tmp_path), 0.07)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 32, seed=0, shard_size=10)
    return folder


def trained(shards, out, *more):
    given = [*SR, "images=80", f"data.path={shards}", f"run={out}", *more]
    return cli.main(["train", *given])


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "sr16"
    assert trained(shards, out, *KEPT) == 0
    return out


def equal(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_a_training_that_keeps_them_is_the_same_training(run, shards, tmp_path):
    assert trained(shards, tmp_path / "without") == 0
    assert equal(run / "weights.safetensors", tmp_path / "without" / "weights.safetensors")
    assert not (tmp_path / "without" / "averages").exists()


def test_another_average_is_a_run_and_a_sampling_choice(run, tmp_path, capfd):
    out = tmp_path / "short"
    assert cli.main(["average", str(run), "--length", "0.08", "--out", str(out)]) == 0
    other = Run(out).load()
    kept, made = Run(run).load().state_dict(), other.state_dict()
    assert any(not torch.equal(kept[key], made[key]) for key in kept)
    assert Run(out).status() == {"images": 80, "total": 80}
    (run.parent / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": {"sr16": {}}}))
    (chosen,) = load_cascade(run.parent, ["sr16.length=0.08", "sr16.steps=2"]).stages
    assert chosen.sampler.steps == 2
    assert all(torch.equal(chosen.state_dict()[key], made[key]) for key in made)
    assert cli.main(["average", str(run), "--length", "0.08", "--out", str(out)]) == 2
    assert "exists" in capfd.readouterr().err
    assert cli.main(["average", str(out), "--length", "0.08"]) == 2
    assert "kept no averages" in capfd.readouterr().err


def test_a_killed_run_keeps_the_same_averages(run, shards, tmp_path, monkeypatch):
    class Killed(BaseException):
        """No `except Exception` stops it."""

    step = Stage.training_step

    def training_step(self, batch, number):
        if number == 10:
            raise Killed
        return step(self, batch, number)

    out, steps = tmp_path / "sr16", itertools.count(1)
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: next(steps) == 7))
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        with pytest.raises(Killed):
            trained(shards, out, *KEPT)
    assert [step for step, _ in Run(out).checkpoints()] == [7]
    assert [step for step, _ in Run(out).snapshots()] == [4, 8]
    Run(out).snapshot(15).write_bytes(b"of an attempt that went further")
    assert trained(shards, out, *KEPT) == 0
    assert [step for step, _ in Run(out).snapshots()] == [4, 8, 12, 16, 20]
    for one, other in zip(Run(run).snapshots(), Run(out).snapshots(), strict=True):
        assert equal(one.path, other.path)
