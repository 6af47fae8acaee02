"""ControlNets: zero convolutions, the frozen network, and what is sampled with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.adapters.adapter import base_hash
from cascade.cli import main
from cascade.conditioning import Cond
from cascade.config.compose import built, composed, saved
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.noise import cosine
from cascade.errors import UserError
from cascade.nets.by_level import ByLevel
from cascade.nets.control import ControlNet, Steered, Steering
from cascade.nets.unet import Residual
from cascade.runs.model import load_cascade, paint
from cascade.runs.run import Run
from tests.models import DECODER, write_clip, write_run
from tests.test_nets import READS_ALL, efficient, prior, unet

NETS = {
    "unet": lambda: unet(**READS_ALL),
    "as published": lambda: unet(
        **READS_ALL, cross=True, positions=False, strided=True, shift_only=True, skip_scale=0.5
    ),
    "patches": lambda: unet(**READS_ALL, patch=2),
    "residual": lambda: Residual(unet(**READS_ALL)),
    "by level": lambda: ByLevel(unet(**READS_ALL), cosine, 10).double().eval(),
    "efficient": efficient,
}


def asked(b=2, side=16):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).double()

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    cond = Cond(draw(b, 16), draw(b, 5, 12), mask, draw(b, 3, side, side))
    return draw(b, 3, side, side), torch.linspace(-1, 1, b).double(), cond, draw(b, 3, 64, 64)


def control_of(net, seed=None):
    """A ControlNet, with random zero convolutions if a seed is given."""
    control = ControlNet(net, size=64, side=16).double().eval()
    if seed is not None:
        torch.manual_seed(seed)
        for conv in (control.embed[-1], *control.joins):
            torch.nn.init.normal_(conv.weight, std=0.2)
    return control


def steered(net, *pairs):
    """The network steered by (control, picture, weight)."""
    return Steered(
        net,
        [Steering(c, c.hint(p), torch.full((len(p),), w, dtype=torch.double)) for c, p, w in pairs],
    )


@pytest.mark.parametrize("name", NETS)
def test_before_the_first_step_outputs_are_those_of_the_network_bit_for_bit(name):
    net = NETS[name]()
    x, logsnr, cond, picture = asked()
    control = control_of(net)
    out = steered(net, (control, picture, 1.0))(x, logsnr, cond)
    assert torch.equal(out, net(x, logsnr, cond))
    assert not {id(p) for p in control.parameters()} & {id(p) for p in net.parameters()}
    out.square().sum().backward()  # all zero convolutions but that of the picture learn at once
    assert all(join.weight.grad.abs().max() > 0 for join in control.joins)
    assert net.zero_grad() is None
    moved = control_of(net, seed=1)
    one, other = (steered(net, (moved, p, 1.0))(x, logsnr, cond) for p in (picture, -picture))
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-6


def test_what_is_added_to_each_skip_connection_is_the_weighted_sum_of_the_zero_convolutions():
    """Against a forward pass in which hooks add them, block by block (figure 2 of the paper)."""
    net = unet(**READS_ALL)
    x, logsnr, cond, picture = asked()
    controls = [(control_of(net, seed=1), picture, 0.7), (control_of(net, seed=2), -picture, -0.3)]
    found = steered(net, *controls)(x, logsnr, cond)

    outputs = []
    for control, shown, weight in controls:
        own = control.net
        hint = control.embed(torch.nn.functional.pixel_unshuffle(shown, 4))
        seen = []
        handles = [
            own.conv_in.register_forward_hook(lambda m, a, out, hint=hint: out + hint),
            *(
                block.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                for block in (*own.down, own.middle[-1])
            ),
        ]
        h = own.encoded(x, logsnr, cond)
        for handle in handles:
            handle.remove()
        outputs.append([weight * join(s) for join, s in zip(control.joins, [h[1], *seen])])
    sums = [sum(parts) for parts in zip(*outputs)]
    c = net.conv_in.out_channels

    def adding(module, args, skips=sums[:-1]):
        if module.resample != 1:
            return args
        h, more = args[0].clone(), skips.pop()
        h[:, -more.shape[1] :] += more
        return h, *args[1:]

    net.middle[-1].register_forward_hook(lambda m, a, out: out + sums[-1])
    for block in net.up:
        block.register_forward_pre_hook(adding)
    assert c == sums[0].shape[1]
    torch.testing.assert_close(found, net(x, logsnr, cond))


def test_both_branches_of_guidance_in_one_call_are_steered_alike():
    net = unet(**READS_ALL)
    x, logsnr, cond, picture = asked()
    by = steered(net, (control_of(net, seed=1), picture, 1.0))
    both = by(torch.cat([x, x]), torch.cat([logsnr, logsnr]), cond.cat(cond))
    torch.testing.assert_close(both.chunk(2)[1], by(x, logsnr, cond))


def test_networks_and_sizes_that_cannot_be_steered_are_refused():
    with pytest.raises(UserError, match="is no U-Net"):
        ControlNet(prior(), 64, 16)
    with pytest.raises(UserError, match="a multiple of 8 px"):
        ControlNet(unet(patch=2), 20, 16)


RUN = ["batch=4", "warmup=8", "grids=0", "control.size=32"]


def write_control(start, folder, overrides):
    """A run with random ControlNets, which would have begun with the weights of another."""
    config = composed("train", [f"run={folder}", *overrides, *RUN])
    saved(config, folder / "config.yaml")
    stage = built(config.stage)
    stage.restore(start, of="the test's")
    torch.manual_seed(0)
    for parameter in stage.control.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stage.export(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base with random weights, a ControlNet trained for it for some steps, and random ones."""
    root = tmp_path_factory.mktemp("control")
    shards = root / "shards"
    write_scenes(shards, "plain", "train", 8, 32, 0)
    write_clip(root / "clip")
    assert main(["data", "precompute", str(shards), "--clip", str(root / "clip")]) == 0
    data = [f"clip.path={root / 'clip'}", f"data.path={shards}"]
    write_run(root / "decoder", [*DECODER, *data], seed=1)
    write_run(root / "other", [*DECODER, *data], seed=2)
    write_run(root / "text", [*DECODER, "stage=decoder_text", *data])
    both = "control=[segmentation,depth]"
    write_control(root / "decoder", root / "shapes", [*DECODER, *data, both])
    write_control(root / "other", root / "foreign", [*DECODER, *data, "control=depth"])
    of_text = [*DECODER, "stage=decoder_text", *data, "control=edges"]
    write_control(root / "text", root / "text_edges", of_text)
    words = [f"start={root / 'decoder'}", "control=edges", f"run={root / 'edges'}", *data, *RUN]
    assert main(["train", *words, "images=12", "optim.lr=1e-2", "logger=csv"]) == 0
    (root / "cascade.yaml").write_text("stages: {decoder: {run: edges, scale: 2.0}}\n")
    (root / "both.yaml").write_text("stages: {decoder: {controls: [edges, shapes]}}\n")
    (root / "base.yaml").write_text("stages: {decoder: {scale: 2.0}}\n")
    (root / "text.yaml").write_text("stages: {decoder: {run: text_edges}}\n")
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(root / "line.png")
    return root


def painted(file, **given):
    rows = {"clip_image": torch.eye(3, 12), **given}
    return paint(load_cascade(file), ["a red circle"] * 3, 0, given=rows)["image_16"]


def hints(name, weight=1.0):
    x = torch.linspace(-1, 1, 32 * 32).view(1, 1, 32, 32).expand(3, 3, -1, -1)
    return {f"control/{name}_32": x, f"control/{name}_weight": torch.full((3,), weight)}


def test_training_moves_the_controls_alone(model):
    base, run = (load_file(model / f"{name}/weights.safetensors") for name in ("decoder", "edges"))
    assert all(torch.equal(run[key], value) for key, value in base.items())
    control = {key: value for key, value in run.items() if key not in base}
    assert {key.split(".")[1] for key in control} == {"edges"}
    zeros = [key for key in control if ".joins." in key and key.endswith("weight")]
    assert all(control[key].abs().max() > 0 for key in zeros)
    copies = {key.removeprefix("control.edges."): value for key, value in control.items()}
    moved = [key for key in copies if key in base and not torch.equal(copies[key], base[key])]
    assert len(moved) > 10


def test_a_controlled_run_paints_as_its_base_does_unless_it_is_told_a_condition(model):
    base = painted(model / "base.yaml")
    assert torch.equal(painted(model / "cascade.yaml"), base)
    assert torch.equal(painted(model / "cascade.yaml", **hints("edges", 0.0)), base)
    assert (painted(model / "cascade.yaml", **hints("edges")) - base).abs().max() > 1e-4


def test_controls_of_several_runs_join_and_each_is_that_of_its_run(model):
    (model / "edges.yaml").write_text("stages: {decoder: {run: edges}}\n")
    joined = painted(model / "both.yaml", **hints("edges"))
    assert torch.equal(joined, painted(model / "edges.yaml", **hints("edges")))
    more = painted(model / "both.yaml", **hints("edges"), **hints("depth", 0.5))
    assert (more - joined).abs().max() > 1e-5


def test_controls_of_another_network_are_refused(model, capsys):
    names = ("edges", "shapes", "decoder", "foreign")
    hashes = [base_hash(Run(model / name).load().state_dict()) for name in names]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    words = ["sample", "--model", str(model / "base.yaml"), "x", "--out", str(model / "no.png")]
    for name, message in (
        ("foreign", f"steers another network ({hashes[3]})"),
        ("other", "was trained without control="),
    ):
        assert main([*words, "--set", f"decoder.controls=[{name}]"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("edges=FOLDER/small.png", "has 31 x 31 pixels, but edges is read at 32 x 32"),
        ("edges=FOLDER/none.png", "cannot read"),
        ("edges=FOLDER/line.png:much", "the weight 'much' is no number"),
        ("edges=FOLDER/line.png:nan", "is no number"),
        ("edges", "give NAME=FILE"),
        ("pose=FOLDER/line.png", "the stages read edges; train one with start=RUN"),
        ("edges=FOLDER/cascade.yaml", "cascade.yaml"),
    ],
)
def test_bad_control_is_refused(model, capsys, control, message):
    Image.new("RGB", (31, 31)).save(model / "small.png")
    out = model / "bad.png"
    words = ["--model", str(model), "a red circle", "--out", str(out), "--set"]
    control = control.replace("FOLDER", str(model))
    # The cascade samples an embedding elsewhere; here nothing gets as far as painting.
    assert main(["sample", *words, "decoder.scale=1", "--control", control]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_control_without_a_trained_network_is_refused(capsys, tmp_path):
    words = ["train", "stage=decoder", "control=edges", "data.path=none", f"run={tmp_path / 'run'}"]
    assert main(words) == 2
    assert "steers a trained network: name its run with start=RUN" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_of_a_folder_depend_on_the_condition(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["generate", "--model", str(model / "text.yaml"), "--out", str(tmp_path / "out")]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--control"]
    line = model / "line.png"
    assert main([*words, f"edges={line}:0.5"]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["control"]["edges"]["weight"] == 0.5
    assert main([*words, f"edges={line}"]) == 2  # another weight would be other pictures
    out = tmp_path / "out.png"
    words = ["sample", "--model", str(model / "text.yaml"), "a red circle", "--out", str(out)]
    assert main([*words, "--control", f"edges={line}"]) == 0
    assert Image.open(out).size == (16, 16)


@pytest.mark.parametrize("name", ["cascade", "both"])
def test_a_model_that_leaves_is_steered_as_here(model, tmp_path, name, capsys):
    out = tmp_path / "out"
    assert main(["export", "--model", str(model / f"{name}.yaml"), "--out", str(out)]) == 0
    there = painted(out / "cascade.yaml", **hints("edges"))
    assert torch.equal(there, painted(model / f"{name}.yaml", **hints("edges")))
    words = ["export", "--format", "diffusers", "--model", str(model / f"{name}.yaml")]
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "no")]) == 2
    assert "control" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_steered_run_is_no_teacher(model, tmp_path, capsys):
    words = ["distill", f"teacher={model / 'edges'}", f"run={tmp_path / 'student'}", "steps=1"]
    assert main(words) == 2
    assert "is steered by ControlNets" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
