"""Every configuration composes, and builds without memory; defaults have one owner."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

import cascade.conf
from cascade.cli import main
from cascade.config.compose import built, composed, differences, one_line_errors
from cascade.errors import UserError
from cascade.verbs.demo import chosen

CONF = Path(next(iter(cascade.conf.__path__)))


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def on_meta(overrides):
    config = composed("train", ["data.path=none", *overrides])
    with torch.device("meta"):
        return config, built(config.stage)


@pytest.mark.parametrize("stage", choices("stage"))
def test_every_stage_builds(stage):
    config, module = on_meta([f"stage={stage}"])
    assert sum(p.numel() for p in module.parameters()) > 0
    assert module.batch == config.batch


@pytest.mark.parametrize("control", choices("control"))
def test_every_control_builds(control):
    more = ["control.extension=x.png"] if control == "column" else []
    config, module = on_meta(["stage=decoder", f"control={control}", *more])
    assert list(module.control) == list(built(config.data.pictures).conditions) == [control]
    assert all(
        p.requires_grad == name.startswith("control.") for name, p in module.named_parameters()
    )


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_recipe_builds(experiment):
    config, module = on_meta([f"experiment={experiment}"])
    assert config.name == experiment
    assert module.batch == config.batch


@pytest.mark.parametrize(
    "cascade_", ["demo", "emoji", "latent", "openmoji", "scenes", "scenes_cpu"]
)
@pytest.mark.parametrize("budget", choices("budget"))
def test_every_stage_of_every_demo_builds(cascade_, budget):
    given = [f"cascade={cascade_}", f"budget={budget}", "data.path=none"]
    config = composed("demo", given)
    for name, overrides in config.stages.items():
        on_meta([*overrides, *config.budgets.get(name, []), *config.each])
    assert set(config.cascade) <= set(config.stages)


@pytest.mark.parametrize("name", choices("cascade"))
def test_every_cascade_can_be_launched_and_demonstrated(name):
    for verb, more in (("demo", []), ("launch", ["launcher=local"])):
        config = composed(verb, [f"cascade={name}", "data.path=none", *more])
        assert config.name == name
        assert config.stages


def test_a_stage_and_a_whole_cascade_are_not_mistaken_for_each_other(capsys):
    """`cascade demo experiment=NAME` is how cascades were named before they had a folder."""
    assert main(["demo", "experiment=unclip_prior_tiny"]) == 2
    assert "is a single stage: run `cascade train experiment=" in capsys.readouterr().err
    assert main(["train", "experiment=scenes_cpu", "data.path=none"]) == 2
    assert "is a whole cascade: run `cascade demo cascade=scenes_cpu`" in capsys.readouterr().err
    given = ["experiment=scenes_cpu", "seed=1", "shards=here"]
    assert chosen(given) == ["cascade=scenes_cpu", "seed=1", "data.path=here"]


@pytest.mark.parametrize("net", choices("net"))
def test_every_network_builds(net):
    config = composed("train", ["data.path=none", "stage=clip", f"net={net}"])
    with torch.device("meta"):
        assert sum(p.numel() for p in built(config.net).parameters()) > 0


@pytest.mark.parametrize("group", ["autoencoder", "clip", "codec", "process", "sampler", "text"])
def test_every_choice_composes(group):
    for choice in choices(group):
        composed("train", ["data.path=none", "stage=decoder_text", f"{group}={choice}"])


def targets(node, where=""):
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{where}.{i}")


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_no_file_repeats_a_default_of_a_signature(path):
    """A default lives in one place. torch's are not ours: their values may be stated."""
    for where, node in targets(OmegaConf.to_container(OmegaConf.load(path))):
        if not node["_target_"].startswith("cascade"):
            continue
        signature = inspect.signature(get_object(node["_target_"]))
        for key, value in node.items():
            if key.startswith("_"):
                continue
            assert key in signature.parameters, f"{where}: no parameter {key}"
            default = signature.parameters[key].default
            assert default is inspect.Parameter.empty or default != value, f"{where}.{key}={value}"


def test_what_differs_in_a_list_is_named_by_its_place():
    """A run whose encoder has a further key of nothing is the same run."""
    old = OmegaConf.create({"encoders": [{"name": "a", "length": 1}]})
    new = OmegaConf.create({"encoders": [{"name": "a", "length": 2, "quick_gelu": None}]})
    assert differences(old, new) == ["encoders.0.length: 1 -> 2"]
    assert len(differences(old, OmegaConf.create({"encoders": []}))) == 1


def test_a_file_that_is_no_yaml_is_one_line():
    """As a sweep of one's own may be; without a way into conf/ the reader itself is asked."""
    with (
        pytest.raises(UserError, match=r"^configuration: .* line 1, column") as error,
        one_line_errors(),
    ):
        yaml.safe_load("base: [net.multipliers=[1], a=1]")
    assert "\n" not in str(error.value)


def test_a_group_that_is_no_name_is_refused():
    with pytest.raises(UserError, match="~GROUP leaves a group out"):
        composed("train", ["stage=decoder", "logger=null", "data.path=x"])
