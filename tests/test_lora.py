"""LoRA: changes of weights, in the format of peft, which computes the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cascade.adapters.adapter import base_hash
from cascade.adapters.lora import CONFIG, WEIGHTS, LoRA, changes, fuse
from cascade.batch import Batch
from cascade.cli import main
from cascade.errors import UserError
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from tests.models import write_model

PARTS = ("net", "conditioner")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    write_model(root)
    for number, (rank, alpha) in enumerate([(4, None), (2, 6.0)]):
        stage = adapted(root, LoRA(rank, alpha, PARTS), number)
        stage.export(root / f"lora{number}")
    return root


def adapted(root, lora, seed=None):
    stage = Run(root / "decoder").load()
    torch.manual_seed(seed or 0)
    stage.adapt(lora)
    for name, parameter in stage.named_parameters():
        if seed is not None and name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return stage


def outputs(stage, double=True):
    """What the network returns: it resamples, attends and convolves."""
    g = torch.Generator().manual_seed(3)
    batch: Batch = {"caption": ["a red circle", "two crosses"], "sample": torch.arange(2)}
    batch["clip_image"] = torch.randn(2, 12, generator=g)
    x = torch.randn(2, 3, 16, 16, generator=g)
    if double:
        stage, x = stage.double(), x.double()
        batch["clip_image"] = batch["clip_image"].double()
    return stage.net(
        x, torch.tensor([0.5, -1.0], dtype=x.dtype), stage.conditioner(stage.encoded(batch))
    )


def test_at_the_beginning_it_changes_no_bit_and_all_its_parameters_learn(model):
    base, stage = Run(model / "decoder").load(), adapted(model, LoRA(4, parts=PARTS))
    assert torch.equal(outputs(stage, double=False), outputs(base, double=False))
    outputs(stage).square().sum().backward()
    named = dict(stage.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trained == {name for name in named if ".lora_" in name}
    # Every linear layer and convolution, the one that enlarges included.
    layers = [m for m in stage.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    within = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(trained) == 2 * len(within) == 2 * len(layers)
    ends = [name for name in trained if name.endswith("lora_B")]
    learning = [name for name in ends if named[name].grad is not None and named[name].grad.any()]
    assert {".".join(n.split(".")[:-4]) for n in set(ends) - set(learning)} <= {
        n for n in within if n.startswith("conditioner")
    }


def test_a_merged_lora_equals_the_unmerged(model):
    unmerged = adapted(model, LoRA(4, parts=PARTS), 0)
    base, merged = (Run(model / "decoder").load() for _ in range(2))
    fuse(merged, [(model / "lora0", 1.0)])
    found = outputs(merged, double=False)
    torch.testing.assert_close(found, outputs(unmerged, double=False), atol=1e-6, rtol=0)
    assert (found - outputs(base, double=False)).abs().max() > 1e-3
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_several_are_fused_as_the_weighted_sum_of_their_changes(model):
    base, stage = Run(model / "decoder").load(), Run(model / "decoder").load()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    fuse(stage, [(model / "lora0", 0.7), (model / "lora1", -0.5)])
    found = [load_file(model / f"lora{n}" / WEIGHTS) for n in (0, 1)]
    changed = 0
    for name, value in stage.state_dict().items():
        expected = state[name].clone()
        for tensors, weight, scale in zip(found, (0.7, -0.5), (1.0, 3.0)):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora"
            if f"{key}_A.weight" in tensors:
                a, b = tensors[f"{key}_A.weight"], tensors[f"{key}_B.weight"]
                # A convolution by A, then one of 1 x 1 by B, is a convolution by their product.
                expected += weight * scale * torch.einsum("or...,ri...->oi...", b, a).view_as(value)
                changed += 1
        torch.testing.assert_close(value, expected)
    assert changed == sum(len(tensors) for tensors in found) // 2


def test_peft_reads_what_is_written_and_merges_the_same(model):
    peft = pytest.importorskip("peft")
    stage, ours = (Run(model / "decoder").load() for _ in range(2))
    read = peft.PeftModel.from_pretrained(stage, model / "lora1").merge_and_unload().state_dict()
    fuse(ours, [(model / "lora1", 1.0)])
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(read[name], value, atol=1e-6, rtol=0)


def test_what_peft_wrote_is_read(model, tmp_path):
    peft = pytest.importorskip("peft")
    stage, ours = (Run(model / "decoder").load() for _ in range(2))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["conv_in", "qkv", "to_tokens"],
        alpha_pattern={"conv_in": 2}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(stage, config)
    theirs.save_pretrained(tmp_path)
    fuse(ours, [(tmp_path, 1.0)])
    before, own = Run(model / "decoder").load().state_dict(), ours.state_dict()
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=0)
    assert sum(not torch.equal(own[name], before[name]) for name in own) > 3


def test_a_cascade_samples_with_adapters_and_leaves_the_loaded_stage_as_it_was(model):
    (model / "with.yaml").write_text(
        "stages: {prior: {}, decoder: {adapters: [{path: lora0, weight: 0.5}]}}\n"
    )
    (model / "none.yaml").write_text(
        "stages: {prior: {}, decoder: {adapters: [{path: lora0, weight: 0}]}}\n"
    )
    (model / "plain.yaml").write_text("stages: {prior: {}, decoder: {}}\n")
    kept = {}

    def load(run):
        return kept.setdefault(run.path, run.load())

    def painted(file, *sets):
        batch = {"caption": ["a red circle"], "sample": torch.tensor([0])}
        return load_cascade(model / file, sets, load)(batch, 0)["image_16"]

    plain, fused = painted("plain.yaml"), painted("with.yaml")
    assert not torch.equal(plain, fused)
    assert torch.equal(painted("none.yaml"), plain)
    assert torch.equal(painted("plain.yaml"), plain)
    sets = "decoder.adapters=[{path: lora0, weight: 0.5}]"
    assert torch.equal(painted("plain.yaml", sets), fused)


def test_an_exported_model_has_its_adapters_merged(model, tmp_path):
    of = "{adapters: [{path: lora0, weight: 0.5}, {path: lora1}]}"
    (model / "both.yaml").write_text(f"stages: {{prior: {{}}, decoder: {of}}}\n")
    out = tmp_path / "out"
    assert main(["export", "--model", str(model / "both.yaml"), "--out", str(out)]) == 0
    batch = {"caption": ["a red circle"], "sample": torch.tensor([0])}
    one, other = (load_cascade(file)(batch, 0)["image_16"] for file in (out, model / "both.yaml"))
    assert torch.equal(one, other)
    assert "adapters" not in (out / "cascade.yaml").read_text()
    assert main(["doctor", str(model / "both.yaml")]) == 0


def refused(model, folder):
    with pytest.raises(UserError) as error:
        changes(folder, Run(model / "decoder").load().state_dict())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapters_of_other_networks_and_other_kinds_are_refused(model, tmp_path):
    own = base_hash(Run(model / "decoder").load().state_dict())
    with pytest.raises(UserError, match=f"trained for another network \\({own}\\)"):
        changes(model / "lora0", Run(model / "early").load().state_dict())

    def copied(name, change=lambda tensors: tensors, **config):
        folder = shutil.copytree(model / "lora0", tmp_path / name)
        about = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**about, **config}))
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return folder

    key = "base_model.model.net.conv_in.lora_A.weight"
    assert "use_dora=True" in refused(model, copied("dora", use_dora=True))
    assert "peft_type=LOHA" in refused(model, copied("loha", peft_type="LOHA"))
    wrong = copied("shape", lambda t: {**t, key: t[key][:, :1].contiguous()})
    assert "does not fit" in refused(model, wrong)
    lacking = copied("half", lambda t: {k: v for k, v in t.items() if k != key})
    assert "is no part of a LoRA" in refused(model, lacking)
    other = copied("other", lambda t: {k.replace("conv_in", "conv_on"): v for k, v in t.items()})
    assert "conv_on, which this network lacks" in refused(model, other)
    assert "holds no adapter_model.safetensors" in refused(model, tmp_path / "none")
    (tmp_path / "half" / WEIGHTS).write_bytes(b"\x00" * 7)
    assert "cannot be read" in refused(model, tmp_path / "half")
    with pytest.raises(UserError, match="give 1 or more"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="no linear layer or convolution"):
        adapted(model, LoRA(parts=["none"]))
