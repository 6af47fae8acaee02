"""What is typed is what is meant: texts stay texts, other values have their parameter's type."""

import math
import random
import re
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import cascade.conf
from cascade.config.compose import composed, loaded
from cascade.config.overrides import assigned
from cascade.config.signatures import parameters
from cascade.errors import UserError
from cascade.eval.sweeps.plan import grid
from cascade.runs import cascade_file
from cascade.slurm.batch import Slurm
from cascade.slurm.chain import chain
from tests.launching import launcher

STREAM = ["data=stream", "data.urls=x", "stage=sr256"]


def of_training(*overrides):
    return composed("train", [*([] if "data=stream" in overrides else ["data.path=x"]), *overrides])


# Types


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([*STREAM, "data.allow_pipe=no"], r"data.allow_pipe=no: write false"),
        ([*STREAM, "data.allow_pipe=Off"], r"data.allow_pipe=Off: write false"),
        (["+data.cache=on"], r"data.cache=on: write true"),
        (["+data.cache=2"], r"data.cache=2: give true or false"),
        (["net.checkpoint=off"], "configuration"),  # a key that this file does not have
        (["+net.checkpoint=off"], r"net.checkpoint=off: write false"),
        (["batch=many"], r"batch=many: give a whole number"),
        (["batch=1.5"], r"batch=1.5: give a whole number"),
        (["batch=1,2"], r"batch=1,2: give a whole number"),
        (["batch=true"], r"batch=true: give a whole number"),
        (["micro_batch=off"], r"micro_batch=off: give a whole number or null"),
        (["optim.lr=fast"], r"optim.lr=fast: give a number"),
        (["gradient_clip=.inf"], r"gradient_clip=inf: give a finite number or null"),
        (["ema=nan"], r"ema=nan: give a finite number"),
        (["sampler=edm", "sampler.solver.s_max=nan"], r"s_max=nan: give a finite number"),
        (["net.multipliers=[1,x]"], r"net.multipliers.1=x: give a whole number"),
        (["net.multipliers=2"], r"net.multipliers=2: give a list, as \[1\]"),
        (["stage.conditioner.drop={caption: off}"], r"drop.caption=off: give a number"),
        (["stage.conditioner.drop={caption: 0.1"], r"give names with values, as \{a: 1\}"),
        (["+a.b=c(d"], r"put a text into quotes, as '\+a.b=\"...\"'"),
        (["run=a${b"], r"run: names cannot have '\$\{'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_right_spelling(overrides, says):
    with pytest.raises(UserError, match=says) as error:
        of_training(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("launcher", ["launcher=slurm", "launcher.gpus=two"], r"launcher.gpus=two"),
        ("launcher", ["launcher=slurm", "launcher.options=--mem=1"], r"give a list, as \['a'\]"),
        ("launch", ["+resources.clip={gpus: two}"], r"resources.clip.gpus=two"),
        ("launch", ["cascade.prior.scale=no"], r"cascade.prior.scale=no: give a number"),
        ("launch", ["evaluate.guidance=[1,off]"], r"evaluate.guidance.1=off: give a number"),
        ("demo", ["scenes.size=big"], r"scenes.size=big: give a whole number"),
    ],
)
def test_so_it_is_in_every_file(name, overrides, says):
    own = ["cascade=unclip", "data.path=x"] if name == "launch" else []
    with pytest.raises(UserError, match=says):
        composed(name, [*own, *overrides])


def test_what_can_be_read_in_one_way_is_read():
    config = of_training("images=1e6", "ema=1", "+data.cache=1", "warmup=2_000", "spike=null")
    assert (config.images, type(config.images)) == (1_000_000, int)
    assert config.data.cache is True
    for infinite in ("inf", ".inf"):
        edm = of_training("sampler=edm", f"sampler.solver.s_max={infinite}")
        assert edm.sampler.solver.s_max == math.inf
    assert math.isnan(of_training("faults=not_a_number").faults.not_a_number.factor)


def test_choices_in_a_file_have_types_as_well(tmp_path):
    def read(text, *choices):
        (tmp_path / "cascade.yaml").write_text(f"stages: {{decoder: {text}}}\n")
        return cascade_file.stage_choices(tmp_path / "cascade.yaml", choices)["decoder"]

    assert read("{interval: [0.3, inf], steps: 16.0}") == {"interval": [0.3, math.inf], "steps": 16}
    assert read("null", "decoder.run=1_000", "decoder.scale=2") == {"run": "1_000", "scale": 2}
    for text, says in [
        ("{run: 2017}", "put it into quotes"),
        ("{scale: no}", "give a number"),
        ("{scale: inf}", "give a finite number"),
        ("{steps: some}", "give a whole number"),
        ("{text_embedding: 'no'}", "write false"),
    ]:
        with pytest.raises(UserError, match=says):
            read(text)


def test_a_configuration_of_before_is_read_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("images: 1000000.0\nrun: 2017\ngradient_clip: .inf\n")
    assert loaded(tmp_path / "config.yaml").images == 1e6


def test_signatures_are_those_that_python_has():
    """By name, of all that conf/ calls, against the imported ones."""
    import inspect

    from hydra.utils import get_object

    texts = [path.read_text() for path in Path(cascade.conf.__path__[0]).rglob("*.yaml")]
    targets = {name for text in texts for name in re.findall(r"_target_: ([\w.]+)", text)}
    assert len(targets) > 40
    for target in sorted(targets - {"hydra.utils.get_method"}):
        found = [name for name in parameters(target) if name != "self"]
        real = [
            name
            for name, p in inspect.signature(get_object(target)).parameters.items()
            if p.kind is not p.VAR_KEYWORD
        ]
        assert found == real, target
    assert parameters(f"{Slurm.__module__}.Slurm")["time"].plain == {"str", "int", "None"}


# Texts

ODD = ["1_000", "1e3", "2017", "no", "true", "null", "inf", "a,b", "a&b", "a=b", "a(b", "a#b", "[a"]
ODD += ["a b", "it's", 'a"b', "a$b", "a%b", "{x}", "range(1,3)", "é", "~/x", "a;b", "<a>", "a:b"]


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_the_text_that_was_typed(name):
    config = composed("train", [f"run={name}", f"data.path={name}"])
    assert (config.run, config.data.path) == (name, name)


def test_what_hydra_reads_as_a_text_stays_as_hydra_reads_it():
    config = composed("train", ["run='2017'", r"data.path=a\,b", "name=x", "clip.path=${run}/c"])
    assert (config.run, config.data.path, config.clip.path) == ("2017", "a,b", "2017/c")
    assert of_training("run=runs/${name}").run == "runs/decoder"


def test_where_a_list_may_be_its_items_are_texts():
    paths = composed("train", ["data.path=[1_000, 'b c', x=y]"]).data.path
    assert paths == ["1_000", "b c", "x=y"]
    urls = "https://host/{train,val}-{00000..00099}.tar"
    assert of_training(*STREAM[:1], STREAM[2], f"data.urls={urls}").data.urls == urls
    own = composed("launcher", ["launcher=slurm", "launcher.options=[--mem=1,--qos=a]"]).launcher
    assert own.options == ["--mem=1", "--qos=a"]


def test_a_quoted_value_is_given_back():
    draw, read = random.Random(0), OverridesParser.create()
    letters = "ab\\\\\\''\"\"${}${},=[]()#%&;:~ \t\né1_0.e"
    texts = ["".join(draw.choices(letters, k=draw.randrange(12))) for _ in range(400)]
    values = [*texts, 0, 1, 1.5, True, False, None, math.inf, 1e-5, ["a,b", "it's", 2], []]
    for value in values:
        given = read.parse_override(assigned("key", value)).value()
        found = OmegaConf.create({"key": given})["key"]
        assert found == value
        assert isinstance(value, list) or type(found) is type(value)


def test_names_of_any_kind_reach_each_task_of_a_plan(tmp_path):
    odd = tmp_path / "a,b=c#d(e $f% [g] 'so' 1_0"
    root, data, one = odd / "run", odd / "2017", launcher("launcher=slurm")
    config = composed("launch", ["cascade=unclip_tiny", f"run={root}", f"data.path={data}"])
    config.stages = {name: config.stages[name] for name in ("clip", "decoder")}
    plan = composed("sweep", ["sweep=guidance", f"home={root}", f"data.path={data}"])
    plan.needs = ["judge"]
    links = [*chain(config, one), *grid(plan, [], one)]
    configs = [yaml.safe_load(t.config) for link in links for t in link.tasks if t.config]
    trained = [config for config in configs if "stage" in config]
    assert {Path(config["run"]) for config in trained} == {
        root / name for name in ("clip", "decoder", "judge")
    }
    assert {config["data"]["path"] for config in trained} == {str(data)}
    assert str(root / "clip") in {config["clip"]["path"] for config in trained}
    measured = next(config for config in configs if "judge" in config)
    assert (measured["data"], measured["judge"]) == (str(data), str(root / "judge"))
