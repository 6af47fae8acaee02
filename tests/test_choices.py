"""What `cascade.yaml` and `--set` choose for each stage, on runs that were never trained."""

import copy
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cascade.config.compose import built, composed, saved
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion import guidance
from cascade.errors import UserError
from cascade.runs.choices import SamplingChoices
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from cascade.training import fit
from tests import small

SMALL = small.SR


def make(folder, name, *overrides, seed=0):
    """A run with random weights."""
    config = composed("train", [*SMALL, "data.path=none", f"run={folder / name}", *overrides])
    torch.manual_seed(seed)
    stage = built(config.stage)
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    saved(config, folder / name / "config.yaml")
    stage.export(folder / name)
    return stage


@pytest.fixture
def runs(tmp_path):
    make(tmp_path, "large")
    make(tmp_path, "small", "net.net.channels=16", seed=1)
    make(tmp_path, "other", "process=cosine_v")
    OmegaConf.save(
        {"stages": {"large": {"steps": 3, "interval": [0.3, 5]}}}, tmp_path / "cascade.yaml"
    )
    return tmp_path


def picture():
    generator = torch.Generator().manual_seed(0)
    return {"image_8": torch.randn(2, 3, 8, 8, generator=generator), "sample": torch.arange(2)}


def test_choices_are_those_of_the_file_and_of_the_command_line(runs):
    (stage,) = load_cascade(runs).stages
    assert (stage.sampler.steps, stage.sampler.interval) == (3, (0.3, 5.0))
    sets = ["large.steps=2", "large.scale=2.0", "large.rescale=0.5", "large.percentile=0.9"]
    sets += ["large.interval=[1, 2.5]", "large.level=0.3", "large.weaker=small"]
    (stage,) = load_cascade(runs, sets).stages
    assert (stage.sampler.steps, stage.sampler.scale) == (2, 2.0)
    assert stage.sampler.interval == (1.0, 2.5)
    assert stage.sampler.guide.func is guidance.rescale
    assert stage.sampler.guide.keywords == {"phi": 0.5}
    assert stage.sampler.threshold.func is guidance.dynamic_threshold
    assert stage.sampler.threshold.keywords == {"percentile": 0.9}
    assert stage.corruption.level == 0.3
    assert stage.weaker.net.net.conv_in.out_channels == 16
    assert stage.sample(picture(), seed=0).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("large.sclae=2", "the choices of a stage are text_embedding, length, sampler"),
        ("large.steps=many", "give a whole number"),
        ("large.steps=2.5", "give a whole number"),
        ("large.scale=[1, 2]", "give a number"),
        ("large.interval=2", r"give a list of 2"),
        ("large.scale=no", "give a number"),
        ("large.scale=.nan", "give a finite number"),
        ("large.text_embedding=2", "give true or false"),
        ("large.weaker=1_000", "1_000 is not a run"),
        ("large.interval=[2.0, 1.0]", r"give \[low, high\]"),
        ("large.interval=[1, 2, 3]", r"give \[low, high\]"),
        ("large.interval=[low, 3]", "interval.0=low: give a number"),
        ("large.interval=[1", "no number, word or list"),
        ("large.percentile=99.5", "at most 1"),
        ("large.best_of=3", "samples image_16: choose best_of or text_embedding for a prior"),
        ("large.text_embedding=true", "samples image_16"),
        ("large.weaker=nowhere", "nowhere is not a run"),
        ("large.weaker=other", "its process is not that of large"),
        ("small.scale=2", "STAGE.OPTION=VALUE of large"),
    ],
)
def test_what_is_no_choice_is_refused_in_one_line(runs, choice, says):
    with pytest.raises(UserError, match=says) as error:
        load_cascade(runs, [choice])
    assert "\n" not in str(error.value)


def test_a_weaker_stage_is_left_behind(runs):
    """One that says the same changes nothing, whatever the scale; another one does."""
    stage = SamplingChoices(steps=3).applied(Run(runs / "large").load())
    plain = stage.sample(picture(), seed=0)
    stage.sampler = replace(stage.sampler, scale=2.0)
    stage.weaker = copy.deepcopy(stage)
    torch.testing.assert_close(stage.sample(picture(), seed=0), plain, atol=1e-5, rtol=0)
    choices = SamplingChoices(scale=2.0, weaker="small")
    guided = choices.applied(stage, Run(runs / "large")).sample(picture(), seed=0)
    assert (guided - plain).abs().max() > 0.1


def test_the_variance_is_measured_when_training_ends_and_saved(tmp_path):
    """With the average's weights, which those that are saved then are."""
    write_scenes(tmp_path / "shards", "plain", "train", 20, 32, seed=0, shard_size=10)
    overrides = ["process=cosine_x0_analytic", "+process.levels=4", "images=16", "ema=0.9"]
    overrides += [f"data.path={tmp_path / 'shards'}", f"run={tmp_path / 'run'}"]
    overrides += ["+data.cache=true", "optim.lr=1e-2", "save_seconds=0.0"]
    folder = fit.train(composed("train", [*SMALL, *overrides]))
    weights = load_file(folder / "weights.safetensors")
    assert (weights["process.log_odds"].abs() < 50).all()
    assert (weights["process.log_odds"].diff() < 0).all()  # more is explained at higher levels
    stage = Run(folder).load()
    config = Run(folder).config
    stage.process.log_odds.zero_()
    stage.measure(fit.loader(built(config.data), 64))
    torch.testing.assert_close(stage.process.log_odds, weights["process.log_odds"])


GROUPS = [
    ("process", "cosine_eps_learned"),
    ("process", "cosine_x0_analytic"),
    ("process", "linear_eps"),
    ("process", "lognormal_v"),
    *(("sampler", name) for name in ("edm", "glide_base", "glide_sr", "imagen_base", "imagen_sr")),
    *(("sampler", f"karlo_{name}") for name in ("prior", "decoder", "sr")),
    *(("sampler", f"unclip_{name}") for name in ("decoder", "sr256", "sr1024")),
]


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_process_and_sampler_samples(group, choice):
    config = composed("train", [*SMALL, "data.path=none", f"{group}={choice}"])
    if choice == "cosine_eps_learned":
        with pytest.raises(UserError, match="6 output channels"):
            built(config.stage).sample(picture(), seed=0)
        return
    stage = built(config.stage)
    steps = stage.sampler.steps
    stage.sampler = replace(stage.sampler, scale=1.0)
    if steps > 30:
        assert len(stage.sampler.logsnrs(stage.process)) == steps + 1
    else:
        assert stage.sample(picture(), seed=0).isfinite().all()
