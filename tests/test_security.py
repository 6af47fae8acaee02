"""Configurations, model directories and weights are strangers' work: nothing in them runs.

All of it tries to write a canary file, which never appears (`tests/conftest.py`).
"""

import ast
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import cascade
import cascade.conf
from cascade import cli
from cascade.config import allowlist
from cascade.config.compose import built, composed, loaded, saved
from cascade.encoders.clip import Architecture, CLIPTraining, FrozenCLIP, save_clip
from cascade.encoders.sources import clip_source
from cascade.encoders.text import FrozenT5
from cascade.runs.model import load_cascade
from cascade.slurm.code import trusting
from tests.hostile import Evil, refused

TINY = Architecture(
    16, 8, vision_layers=1, vision_width=16, patch=8, text_width=16, text_layers=1, text_heads=1
)


# Configurations


def test_the_canary_can_be_written_and_hydra_alone_would_do_it(tmp_path):
    """A control: what the gate refuses does run without it."""
    for i, file in enumerate((tmp_path / "a", tmp_path / "b")):
        weights = tmp_path / f"{i}.pt"
        torch.save(Evil(file), weights)
        if i:
            instantiate(call("torch.nn.modules.module.torch.load", f=weights, weights_only=False))
        else:
            pickle.loads(pickle.dumps(Evil(file)))
        assert file.exists()


def call(target, *args, **arguments):
    node = {"_target_": target, **{k: str(v) if k == "f" else v for k, v in arguments.items()}}
    return {**node, "_args_": list(args)} if args else node


def hostile(file):
    """Configurations by what they would call."""
    touch, write = f"touch {file}", f"open({str(file)!r}, 'w')"
    system = call("os.system", touch)
    pixels = {"_target_": "cascade.codecs.Pixels"}
    look_up = {"_target_": "hydra.utils.get_method"}
    return {
        "os.system": system,
        "posix.system": call("posix.system", touch),
        "logging.os.system": call("logging.os.system", touch),
        "subprocess.Popen": call("subprocess.Popen", ["touch", str(file)]),
        "builtins.eval": call("builtins.eval", write),
        "builtins.exec": call("builtins.exec", write),
        "cascade.stage.__builtins__.eval": call("cascade.stage.__builtins__.eval", write),
        "torch.load": call("torch.load", f="evil.pt", weights_only=False),
        "torch.nn.modules.module.torch.load": call(
            "torch.nn.modules.module.torch.load", f="evil.pt", weights_only=False
        ),
        "cascade.stage.torch.load": call("cascade.stage.torch.load", "evil.pt"),
        "torch.hub.load": call("torch.hub.load", "evil/repository", "model"),
        "torch.utils.cpp_extension.load": call("torch.utils.cpp_extension.load", "x", "x.cpp"),
        "numpy.load": call("numpy.load", "evil.npy", allow_pickle=True),
        "pickle.loads": call("pickle.loads", "evil"),
        "pathlib.Path.write_text": call("pathlib.Path.write_text", str(file), "x"),
        "pathlib.Path": call("pathlib.Path", str(file)),
        "importlib.import_module": call("importlib.import_module", "hostile_module"),
        "runpy.run_module": call("runpy.run_module", "hostile_module"),
        "functools.partial": call("functools.partial", look_up | {"path": "os.system"}, touch),
        "hydra.utils.instantiate": call("hydra.utils.instantiate", system, _recursive_=False),
        "hydra.utils.get_object": call("hydra.utils.get_object", "hostile_module.make"),
        "hydra._internal.utils._locate": call("hydra._internal.utils._locate", "hostile_module"),
        "lightning.pytorch.cli.instantiate_class": call(
            "lightning.pytorch.cli.instantiate_class", [], {"class_path": "hostile_module.make"}
        ),
        "hostile_module.make": call("hostile_module.make"),
        "cascade.hostile_module": call("cascade.hostile_module"),
        "cascade.cli.main": call("cascade.cli.main", ["train"]),
        "cascade.stage": call("cascade.stage"),
        "cascade.stage.Stage.load_from_checkpoint": call(
            "cascade.stage.Stage.load_from_checkpoint", "evil.pt"
        ),
        "cascade.encoders.clip.save_clip": call("cascade.encoders.clip.save_clip", f=str(file)),
        "cascade.encoders.weights.tensors_of": call("cascade.encoders.weights.tensors_of", []),
        "cascade.encoders.text_tower._Block": call("cascade.encoders.text_tower._Block"),
        "cascade.nets.layers.run": call("cascade.nets.layers.run"),
        "cascade.nets.layers.checkpoint": call("cascade.nets.layers.checkpoint"),
        "cascade.data.embeddings.write_embeddings": call(
            "cascade.data.embeddings.write_embeddings"
        ),
        "cascade.diffusion.analytic.AnalyticVariance.measure": call(
            "cascade.diffusion.analytic.AnalyticVariance.measure"
        ),
        "cascade.diffusion.hostile_module.make": call("cascade.diffusion.hostile_module.make"),
        "cascade.diffusion.solvers._": call("cascade.diffusion.solvers._"),
        "cascade.diffusion.solvers.math.floor": call("cascade.diffusion.solvers.math.floor", 1.5),
        "a path of get_method": look_up | {"path": "os.system"},
        "an alias as path": look_up | {"path": "cascade.stage.torch.load"},
        "a module as path": look_up | {"path": "hostile_module.make"},
        "a path as argument": call("hydra.utils.get_method", "os.system"),
        "a path beside another": call(
            "hydra.utils.get_method", "os.system", path="cascade.conditioning.mean"
        ),
        "a computed path": look_up | {"path": system},
        "no path": look_up,
        "a look-up, deferred": look_up | {"path": "cascade.stage.Stage", "_partial_": True},
        "nested": pixels | {"size": system},
        "nested, not to be built": pixels | {"size": system, "_recursive_": False},
        "in a list": pixels | {"size": [1, [system]]},
        "in arguments": pixels | {"_args_": [system]},
        "in a dictionary": {"a": {"b": [{"c": system}]}},
        "deferred": system | {"_partial_": True},
        "a target that is a target": {"_target_": call("hydra.utils.get_method", "os.system")},
        "a number": {"_target_": 1},
        "no name": {"_target_": None},
        "empty": {"_target_": ""},
        "dots": {"_target_": "cascade..stage.Stage"},
        "relative": {"_target_": ".cascade.stage.Stage"},
        "a name in two lines": {"_target_": "os\n.system"},
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_a_configuration_calls_nothing_that_the_list_lacks(name, canary):
    before = set(sys.modules)
    for config in (hostile(canary)[name], OmegaConf.create({"stage": hostile(canary)[name]}).stage):
        message = refused(lambda config=config: built(config), "^configuration ")
        if "." in name:
            assert repr(name) in message
            assert "nothing that a configuration may call" in message
    roots = {module.partition(".")[0] for module in set(sys.modules) - before}
    assert roots <= {"cascade"}


def test_an_alias_is_refused_by_its_real_name():
    for alias, real in (
        ("torch.nn.modules.module.torch.load", "torch.serialization.load"),
        ("cascade.stage.torch.optim.SGD", "torch.optim.sgd.SGD"),
        ("cascade.encoders.clip.save_file", "safetensors.torch.save_file"),
    ):
        assert f"{alias!r}, which is {real}," in refused(lambda a=alias: built({"_target_": a}))
    named = {"_target_": "hydra.utils.get_method", "path": "cascade.encoders.clip.Architecture"}
    assert built(named) is Architecture  # an alias of what is on the list


def test_the_refusal_names_the_place_and_the_remedy():
    config = composed("train", ["stage=decoder_text", "data.path=x", "net._target_=os.system"])
    assert refused(lambda: built(config.stage)) == (
        "configuration 'stage.net._target_': 'os.system' is nothing that a configuration may call; "
        "if it is your own code, name its module: cascade --trust MODULE"
    )


def test_conf_calls_what_the_list_admits_and_every_single_name():
    called = set()
    for path in Path(cascade.conf.__path__[0]).rglob("*.yaml"):
        tree = OmegaConf.to_container(OmegaConf.load(path))
        for place, node in allowlist._nodes(tree, path.stem):
            if isinstance(node, dict) and "_target_" in node:
                called.add(allowlist._admitted(node["_target_"], place))
                if node["_target_"] == allowlist._LOOK_UP:
                    called.add(allowlist._admitted(node["path"], place))
    assert called >= allowlist.NAMES
    for room in (*allowlist.PURE, *allowlist.ROOMS):
        assert any(name.startswith(f"{room}.") for name in called), room


def test_pure_rooms_import_nothing_that_touches_files_or_processes():
    """So that each of their functions may be called with anything."""
    allowed = {"cascade", "collections", "dataclasses", "functools", "itertools", "jaxtyping"}
    allowed |= {"math", "torch", "typing"}
    for room in allowlist.PURE:
        root = Path(cascade.__path__[0], *room.split(".")[1:])
        for path in (
            [root.with_suffix(".py")] if root.with_suffix(".py").exists() else root.glob("*.py")
        ):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert {name.partition(".")[0] for name in names} <= allowed, path


MINE = """
import os
from os import system

class Codec:
    def __init__(self, size): self.size = size

def solver(denoise, x, logsnrs, noise): return x
"""


def test_a_users_own_module_is_admitted_by_the_command_line_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "__init__.py").touch()
    (tmp_path / "of_mine" / "parts.py").write_text(MINE)
    (tmp_path / "of_mine_too.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    codec = {"_target_": "of_mine.parts.Codec", "size": 3}
    refused(lambda: built(codec), "name its module: cascade --trust MODULE")
    assert "of_mine" not in sys.modules
    show = ["train", "--show", "stage=decoder_text", "data.path=x", "stage.codec._target_=x"]
    with monkeypatch.context() as context:
        context.setattr(allowlist, "_trusted", [])
        assert cli.main(["--trust", "of_mine.parts", *show]) == 0
        assert built(codec).size == 3
        named = {"_target_": "hydra.utils.get_method", "path": "of_mine.parts.solver"}
        assert built(named).__name__ == "solver"
        assert trusting() == ["--trust", "of_mine.parts"]
        for name in ("of_mine.parts.os.system", "of_mine.parts.system", "of_mine_too.Codec"):
            refused(lambda name=name: built({"_target_": name}), "nothing that a configuration")
        assert "of_mine_too" not in sys.modules
        assert cli.main(show) == 0
        refused(lambda: built(codec), "nothing that a configuration may call")
    capsys.readouterr()


def test_an_interpolation_cannot_smuggle_a_target_or_a_secret(canary, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    system = f"{{_target_: os.system, _args_: ['touch {canary}']}}"
    config = OmegaConf.create({"a": f'${{oc.create:"{system}"}}', "name": "os.system"})
    refused(lambda: built(config), "os.system")
    refused(lambda: built({"a": {"_target_": "${name}"}, "name": "os.system"}), "os.system")
    for escaped in (r"\${oc.env:SECRET}", r"\${a}"):  # resolved once it is a value, twice a secret
        config = OmegaConf.create({"a": {"b": escaped}})
        assert "hunter2" not in refused(lambda config=config: built(config), "write it out")


def test_a_saved_configuration_is_values_only(tmp_path, canary, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    aliases = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    path = tmp_path / "config.yaml"
    for text in (
        "a: ${oc.env:SECRET}",
        'a: "\\x24{oc.env:SECRET}"',
        "a: [{b: 'x${oc.env:SECRET}'}]",
        "a: ${b}\nb: 1",
        "a: ${custom:1}",
        "a: ${broken",
        f"a0: &a0 x\n{aliases}",
        f"a: !!python/object/apply:os.system ['touch {canary}']",
        "a: !!python/name:os.system",
        "a: !<tag:yaml.org,2002:python/module:hostile_module> ''",
        "[" * 1000 + "]" * 1000,
        "a: {" * 1000,
        "a: 1\na: 2",
        "- a list",
        "a: \x00",
        "x: " + "1" * 5000,
        "a: *a",
    ):
        path.write_text(text)
        assert "hunter2" not in refused(lambda: loaded(path), r"config.*")
    path.write_bytes(b"\xff\xfe\xff")
    refused(lambda: loaded(path), "damaged")
    saved(composed("train", ["stage=decoder_text", "data.path=x"]), path)
    assert loaded(path).stage.codec.size == 64


@pytest.mark.parametrize("name", ["os.system", "a module as path", "deferred", "in a dictionary"])
def test_a_model_directory_runs_nothing(name, tmp_path, canary, capsys):
    config = composed("train", ["stage=decoder_text", "data.path=x", "net=unet_tiny"])
    config.stage.codec = hostile(canary)[name]
    config.clip.path = str(canary)
    saved(config, tmp_path / "model" / "decoder" / "config.yaml")
    (tmp_path / "model" / "cascade.yaml").write_text("stages: {decoder: {scale: 2.0}}\n")
    argv = ["sample", "--model", str(tmp_path / "model"), "a cat"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*argv, "--out", str(tmp_path / "out.png")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert re.fullmatch(r"cascade: configuration '.*codec.*\n", capsys.readouterr().err)
    for text in ("stages: {decoder: {weaker: '${oc.env:HOME}'}}", "stages: ${oc.env:HOME}"):
        (tmp_path / "model" / "cascade.yaml").write_text(text)
        message = refused(lambda: load_cascade(tmp_path / "model"), "write it out")
        assert os.environ["HOME"] not in message


# Weights


# What the refusal of each file says of it.
FOUND = {
    "archive.pt": "it would run posix.system: give the weights as safetensors",
    "pickle.pt": "a pickle that cannot be read safely",
    "protocol4.pt": "a pickle that cannot be read safely",
    "old.pt": "a pickle that cannot be read safely",
    "script.pt": "a TorchScript archive, as OpenAI publishes",
    "objects.npz": "a file of NumPy arrays",
    "objects.npy": "a single NumPy array",
    "long.safetensors": "it is cut short, or no safetensors file",
    "longer.safetensors": "it is cut short, or no safetensors file",
    "cut.safetensors": r"it is cut short \(62 of 66 bytes\)",
    "deep.safetensors": "its header is damaged",
    "none.safetensors": "its header is damaged",
    "evil.safetensors": "a pickle or an archive of torch, not safetensors",
    "empty.safetensors": "an empty file",
    "lfs.safetensors": "a pointer of Git LFS",
    "page.pt": "it is a web page",
    "renamed.bin": "it is a safetensors file: give it the ending .safetensors",
}


def files_of_weights(folder, file):
    """Weights of strangers by name, each with what the refusal says of it."""
    folder.mkdir()
    torch.save({"state_dict": {"x": Evil(file)}}, folder / "archive.pt")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Evil(file)))
    (folder / "protocol4.pt").write_bytes(pickle.dumps({"x": Evil(file)}, protocol=4))
    torch.save({"x": Evil(file)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(1, 1)).save(folder / "script.pt")
    np.savez(folder / "objects.npz", x=np.array([Evil(file)], dtype=object))
    np.save(folder / "objects.npy", np.array([Evil(file)], dtype=object))
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for name, length, rest in (
        ("long", 2**63, header),
        ("longer", 2**40, header),
        ("cut", len(header), header),
        ("deep", 200_000, b"[" * 200_000),
        ("none", 0, b""),
    ):
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", length) + rest)
    (folder / "evil.safetensors").write_bytes(pickle.dumps(Evil(file)))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    (folder / "page.pt").write_text("\n<!DOCTYPE html><html>Not found</html>")
    whole = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "renamed.bin").write_bytes(whole)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(TINY, TINY.build(), folder)
    return folder


def test_foreign_weights_run_nothing(clip, tmp_path, canary):
    for file in files_of_weights(tmp_path / "weights", canary):
        source = clip_source(str(clip), None)._replace(weights=file)
        frozen = FrozenCLIP(str(clip))
        frozen.__dict__["_source"] = source
        if file.name == "script.pt":  # which is read as data
            refused(lambda f=frozen: f.text(["a"]), "does not hold the weights of")
        else:
            message = refused(lambda f=frozen: f.text(["a"]), FOUND[file.name])
            assert f"{file} cannot be read as weights of" in message
        folder = tmp_path / f"t5 {file.name}"
        folder.mkdir()
        name = "model.safetensors" if file.suffix == ".safetensors" else "pytorch_model.bin"
        shutil.copy(file, folder / name)
        sizes = "d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2, vocab_size: 20"
        about = re.sub(r"(\w+):", r'"\1":', f"{{model_type: 't5', {sizes}}}").replace("'", '"')
        (folder / "config.json").write_text(about)
        (folder / "spiece.model").write_bytes(b"")
        found = FOUND[file.name] if file.suffix != ".npz" else "torch does not read|"
        refused(lambda folder=folder: FrozenT5(str(folder))._model, found)


def test_a_run_with_foreign_weights_is_refused(tmp_path, canary):
    overrides = ["stage=decoder_text", "data.path=x", "net=unet_tiny", "text=clip_tiny"]
    with torch.device("meta"):
        stage = built(composed("train", overrides).stage)
    for file in files_of_weights(tmp_path / "weights", canary):
        shutil.copy(file, tmp_path / "weights.safetensors")
        refused(lambda: stage.restore(tmp_path), "cannot be read as weights of|does not name")
        shutil.copy(file, tmp_path / "open_clip_model.safetensors")
        module = CLIPTraining(TINY, torch.optim.AdamW)
        words = "cannot be read as weights of|lacks positional_embedding .* has besides x;"
        refused(lambda module=module: module.restore(tmp_path), words)


def test_a_t5_with_code_beside_it_runs_nothing(tmp_path, canary, monkeypatch):
    """`AutoTokenizer` would ask at the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = "from hostile_module import make as Tokenizer\n"
    (tmp_path / "tokenizer.py").write_text(code)
    named = '{"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["tokenizer.Tokenizer"'
    (tmp_path / "tokenizer_config.json").write_text(f"{named}, null]}}}}")
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 16}')
    (tmp_path / "spiece.model").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(lambda: FrozenT5(str(tmp_path)).text(["a"]), "cannot be read as T5's tokenizer")
