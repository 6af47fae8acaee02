"""Distillation, against the closed form on Gaussian data, and as a training."""

import itertools
import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cascade import cli
from cascade.conditioning import Cond
from cascade.config.compose import saved
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.distillation import Distilled
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.noise import cosine, cosine_logsnr
from cascade.diffusion.prediction import v, x0
from cascade.diffusion.sampling import DiffusionSampler
from cascade.diffusion.solvers import ddim
from cascade.diffusion.spacing import even, karras
from cascade.diffusion.weighting import clipped_v
from cascade.draws import Draws
from cascade.errors import UserError
from cascade.runs.run import Run
from cascade.stage import Stage
from tests.small import SR

VARIANCE = 0.3  # of the Gaussian data
PROCESSES = {
    "v, cosine": Diffusion(cosine, v),
    "x0, weighted": Diffusion(cosine_logsnr, x0, clipped_v),
}


def gain(logsnr):
    """x0_hat = gain x_t, the mean of x0 given x_t."""
    alpha2 = 1 / (1 + math.exp(-logsnr))
    return alpha2**0.5 * VARIANCE / (alpha2 * VARIANCE + 1 - alpha2)


def across(t, s, gain):
    """x_s = across x_t, by DDIM's step with x0_hat = gain x_t."""
    a_t, a_s = ((1 / (1 + math.exp(-level))) ** 0.5 for level in (t, s))
    s_t, s_s = (1 - a_t**2) ** 0.5, (1 - a_s**2) ** 0.5
    return a_s * gain + s_s / s_t * (1 - a_t * gain)


def network(process, gains):
    """The network whose x0_hat at each level is the level's gain times x_t."""

    def net(x, logsnr, cond):
        out = []
        for row, level in zip(x, logsnr.double()):
            c_in, c_skip, c_out = process.prediction(level)
            near = min(gains, key=lambda known: abs(known - float(level)))
            out.append((gains[near] - c_skip) / (c_in * c_out) * row)
        return torch.stack(out).to(x)

    return net


@pytest.mark.parametrize("spacing", [even, karras], ids=["even", "karras"])
@pytest.mark.parametrize("by", [2, 4])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_step_of_the_student_equals_those_of_the_teacher(name, by, spacing):
    process, steps = PROCESSES[name], 3
    student = Distilled(process, steps, by, spacing)
    taught = student.taught.tolist()
    teacher = network(process, {t: gain(t) for t in taught[:-1]})
    gains = {}
    for i in range(steps):
        ends = taught[by * i : by * (i + 1) + 1]
        whole = math.prod(across(t, s, gain(t)) for t, s in itertools.pairwise(ends))
        # `across` is affine in the gain.
        none, one = across(ends[0], ends[-1], 0.0), across(ends[0], ends[-1], 1.0)
        gains[ends[0]] = (whole - none) / (one - none)
    net = network(process, gains)

    def carry(rows, x, logsnrs):
        return ddim(lambda x, t: process.denoise(teacher, x, t, None), x, logsnrs)

    data = VARIANCE**0.5 * torch.randn(24, 5, dtype=torch.float64)
    loss = student.loss(net, data, None, Draws(0, "noise", range(24)), carry)
    worse = student.loss(teacher, data, None, Draws(0, "noise", range(24)), carry)
    assert loss.max() < 1e-10
    assert worse.max() > 1e-5
    drawn = [
        DiffusionSampler(n, ddim, spacing=spacing)(
            of, by_net, (24, 5), Cond(), None, Draws(1, "noise", range(24))
        )
        for n, of, by_net in ((steps, student, net), (steps * by, process, teacher))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)


def test_a_student_samples_in_its_own_number_of_steps_alone():
    sampler = DiffusionSampler(4, ddim)
    with pytest.raises(UserError, match="steps=4: it was distilled for 2 steps"):
        sampler.logsnrs(Distilled(Diffusion(), 2))
    assert torch.equal(sampler.logsnrs(Distilled(Diffusion(), 4)), sampler.logsnrs(Diffusion()))


@pytest.mark.parametrize(("steps", "by"), [(0, 2), (2, 0)])
def test_no_steps_are_refused(steps, by):
    with pytest.raises(UserError, match="give at least 1"):
        Distilled(Diffusion(), steps, by)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The run of a small decoder that sees captions, with a sketch and dropped conditions."""
    folder = tmp_path_factory.mktemp("teacher")
    write_scenes(folder / "shards", "plain", "train", 20, 32, seed=0, shard_size=10)
    given = [*SR, "images=16", f"data.path={folder / 'shards'}", f"run={folder / 'sr16'}"]
    assert cli.main(["train", *given, "sampler.steps=4"]) == 0
    return folder / "sr16"


def distilled(teacher, out, *more):
    overrides = [f"run={out}", f"teacher={teacher}", "steps=2", "images=16", "ema=0.5", "grids=0"]
    return cli.main(["distill", *overrides, *more])


def test_distilling_is_a_training_that_begins_with_the_teacher(teacher, tmp_path, capfd):
    out = tmp_path / "fast"
    assert distilled(teacher, out, "lr=0") == 0
    one, other = (load_file(run / "weights.safetensors") for run in (teacher, out))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((out / "status.json").read_text()) == {"images": 16, "total": 16}
    assert distilled(teacher, out, "lr=0") == 0
    assert "finished before" in capfd.readouterr().out
    assert distilled(teacher, tmp_path / "other") == 0
    changed = load_file(tmp_path / "other" / "weights.safetensors")
    assert any(not torch.equal(one[key], changed[key]) for key in one)
    student = Run(tmp_path / "other").load()
    assert (student.sampler.steps, student.process.by) == (2, 2)
    assert student.teacher is None


def test_a_distillation_can_be_shown_and_trained_from_its_configuration(teacher, tmp_path, capfd):
    assert distilled(teacher, tmp_path / "one", "seed=3", "--show") == 0
    (tmp_path / "shown.yaml").write_text(capfd.readouterr().out)
    assert cli.main(["train", "--config", str(tmp_path / "shown.yaml")]) == 0
    shown = load_file(tmp_path / "one" / "weights.safetensors")
    assert distilled(teacher, tmp_path / "two", "seed=3") == 0
    told = load_file(tmp_path / "two" / "weights.safetensors")
    assert all(torch.equal(shown[key], told[key]) for key in told)


def test_a_student_can_teach_at_its_own_levels(teacher, tmp_path):
    choices = "choices={sampler: few, steps: 8}"
    assert distilled(teacher, tmp_path / "one", "steps=4", choices) == 0
    assert distilled(tmp_path / "one", tmp_path / "two", "steps=2") == 0
    one, two = (Run(tmp_path / name).load() for name in ("one", "two"))
    assert torch.equal(two.process.taught, one.process.levels)
    assert torch.equal(one.process.levels, karras(cosine, 8, sigma_min=0.03)[::2])
    assert torch.equal(two.sampler.logsnrs(two.process), two.process.levels)


@pytest.mark.parametrize(
    "part",
    [
        {"_target_": "cascade.encoders.clip.CLIPTraining"},
        {"process": {"_target_": "cascade.autoregressive.NextToken"}},
        {"process": {"_target_": "cascade.diffusion.learned_variance.LearnedVariance"}},
    ],
)
def test_a_run_without_a_plain_diffusion_is_refused(part, teacher, tmp_path, capfd):
    config = OmegaConf.to_container(Run(teacher).config)
    keep = ("sampler",) if "LearnedVariance" in str(part) else ()
    config["stage"] = {**{key: config["stage"][key] for key in keep}, **part}
    saved(OmegaConf.create(config), tmp_path / "other" / "config.yaml")
    assert distilled(tmp_path / "other", tmp_path / "fast") == 2
    assert "other " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["steps=3"], "4 steps, which is no multiple of steps=3: set choices.steps=12"),
        (["steps=4"], "no multiple of steps=4"),
        (["choices={sampler: ancestral, steps: 4}"], "samples at random: set choices.sampler=ddim"),
        (["choices={best_of: 2}"], "choices.best_of says nothing"),
        (["teacher=nowhere"], "nowhere"),
        (["image=3"], "image"),
    ],
)
def test_what_cannot_be_distilled_is_refused(more, message, teacher, tmp_path, capfd):
    assert distilled(teacher, tmp_path / "fast", *more) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "fast" / "weights.safetensors").exists()


def test_a_killed_distillation_equals_one_never_killed(teacher, tmp_path, monkeypatch):
    class Killed(BaseException):
        """No `except Exception` stops it."""

    step = Stage.training_step

    def training_step(self, batch, number):
        if number == 2:
            raise Killed
        return step(self, batch, number)

    assert distilled(teacher, tmp_path / "whole", "choices={steps: 8}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        with pytest.raises(Killed):
            distilled(teacher, tmp_path / "killed", "choices={steps: 8}")
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    assert distilled(teacher, tmp_path / "killed", "choices={steps: 8}") == 0
    whole, killed = (load_file(tmp_path / n / "weights.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
