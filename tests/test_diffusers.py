"""What leaves for diffusers computes there what it computes here."""

import json
from itertools import pairwise

import diffusers
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cascade.cli import main
from cascade.conditioning import Cond
from cascade.config.compose import built, composed, saved
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.noise import cosine_table
from cascade.draws import Draws
from cascade.encoders.architecture import Architecture
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.export.tokenizer import clip_tokenizer
from cascade.export.unets import unet_model
from cascade.runs.model import load_cascade
from cascade.runs.run import Run

CAPTIONS = ["a red circle", "two blue squares above a star"]
SMALL = ["net.channels=32", "net.multipliers=[1,2]", "net.blocks=1", "net.embed=64"]
TABLE = "cascade.diffusion.noise.cosine_table"
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def spread(module, seed=0):
    """Weights for which all parts matter; U-Nets give little, so that sampling is tame."""
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
        if p.ndim == 1 and name.endswith("weight"):
            p.data += 1
        if name.endswith(("conv_out.weight", "conv_out.bias")) and "down" not in name:
            p.data *= 0.3
    return module.eval()


def theirs_of(model):
    """An instance of the class of diffusers with exactly these weights."""
    net = getattr(diffusers, model.kind)(**model.config)
    net.load_state_dict(model.state, strict=True)
    return net.eval()


UNETS = {
    "karlo_decoder": ["net=karlo_decoder", "net.attention=[1]", "net.width=48"],
    "every level": ["net=glide_released", "net.attention=[0,1]", "+net.head_channels=16"],
    "blocks by level": ["net=glide_released", "net.attention=[1]", "net.blocks=[1,2]"],
    "karlo_sr": ["net=karlo_sr"],
    "unclip_sr256": ["net=unclip_sr256"],
    "ddpm_64": ["net=ddpm_64", "net.attention=[1]", "+net.image_channels=3"],
    "adm": ["net=adm", "net.attention=[1]", "net.width=null", "+net.head_channels=32"],
}


SLOW = {"every level", "blocks by level", "unclip_sr256"}


def marked(name):
    return pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())


@pytest.mark.parametrize("name", map(marked, UNETS))
@torch.no_grad()
def test_a_unet_computes_the_same(name):
    own = UNETS[name]
    more = [one for one in SMALL if one.split("=")[0] not in " ".join(own)]
    config = composed("train", ["data.path=none", "stage=clip", *own[:1], *more, *own[1:]]).net
    net = spread(built(config))
    plain = OmegaConf.to_container(config)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    shift = draw(net.embed) if net.width is None else None
    theirs = theirs_of(unet_model(net, plain, 16, "stage", shift))
    index = torch.tensor([3, 700])
    logsnr = cosine_table((index.double() + 1) / 1000).float()
    x, vector = draw(2, 3, 16, 16), draw(2, net.embed)
    image = draw(2, 3, 16, 16) if net.image_channels else None
    tokens, mask, more = None, None, {}
    if net.width is not None:
        tokens, mask = draw(2, 5, net.width), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).bool()
        more = {"encoder_hidden_states": tokens, "attention_mask": mask, "class_labels": vector}
    else:
        vector = shift.expand(2, -1)
    own = net(x, logsnr, Cond(vector, tokens, mask, image))
    given = x if image is None else torch.cat([x, image], 1)
    found = theirs(given, index, **more).sample
    torch.testing.assert_close(found / own.abs().max(), own / own.abs().max(), **NEAR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 2}, "net.patch=2"),
        ({"skip_scale": 0.7}, "net.skip_scale=0.7"),
        ({"positions": True}, "net.positions=true"),
        ({"level": None}, "net.level=null"),
        ({"norm": {}}, "net.norm.groups=null"),
        ({"attention": [0]}, r"net.attention=\[0\]"),
        ({"attention": [0, 1]}, "net.head_channels=64"),
        ({"strided": True}, "net.strided=true"),
        ({"unheard_of": 3}, "net.unheard_of=3"),
        ({"_target_": "cascade.nets.efficient_unet.EfficientUNet"}, "net=EfficientUNet"),
    ],
)
def test_what_no_class_represents_is_refused(change, message):
    from cascade.errors import UserError

    own = ["net=karlo_decoder", *SMALL, "net.attention=[1]", "net.width=48"]
    config = composed("train", ["data.path=none", "stage=clip", *own]).net
    plain = {**OmegaConf.to_container(config), **change}
    with pytest.raises(UserError, match=rf"{message} has no counterpart in diffusers"):
        unet_model(built(config), plain, 16, "decoder")


def write_run(folder, overrides, seed):
    config = composed("train", ["data.path=none", f"run={folder}", *overrides])
    saved(config, folder / "config.yaml")
    stage = built(config.stage)
    spread(stage, seed)
    if folder.name == "prior":
        stage.codec.mean.normal_(0, 0.3)
        stage.codec.std.fill_(1.5)
    stage.export(folder)


def write_karlo(root):
    """A small cascade in Karlo's layout."""
    sizes = {"text_width": 24, "text_layers": 2, "text_heads": 2, "length": 20}
    clip = Architecture(32, 24, vision_layers=1, vision_width=16, head_width=16, **sizes)
    torch.manual_seed(5)
    model = clip.build()
    model.text_projection.data *= 8
    save_clip(clip, model, root / "clip")
    given = [f"clip.path={root / 'clip'}", "clip=tiny", "clip.model.dim=24", "text.size=24"]
    given += ["clip.model.length=20", "clip.model.text_width=24"]
    prior = ["experiment=karlo_prior_released", *given, "net.layers=2", "net.width=64"]
    prior += ["net.heads=4", "net.context=20", "sampler.steps=4", "sampler.scale=2.0"]
    write_run(root / "prior", prior, 1)
    unet = [*SMALL, "net.norm.groups=8"]
    decoder = ["experiment=karlo_decoder_released", *given, "size=16", *unet, "net.width=48"]
    decoder += ["net.attention=[1]", "sampler.steps=5", "sampler.scale=3.0"]
    write_run(root / "decoder", decoder, 2)
    sr = ["experiment=karlo_sr256_released", "size=64", "low=16", "crop=null"]
    sr += [one.replace("net.", "net.net.") for one in unet]
    write_run(root / "sr64", [*sr, "sampler.steps=3"], 3)
    stages = {"prior": None, "decoder": {"steps": 4, "scale": 2.5}, "sr64": None}
    (root / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": stages}))


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    root = tmp_path_factory.mktemp("karlo")
    write_karlo(root / "model")
    command = ["export", "--model", str(root / "model"), "--format", "diffusers"]
    assert main([*command, "--out", str(root / "out")]) == 0
    return root / "model", root / "out"


def in_double_precision(scheduler):
    """Tables as in the originals; diffusers has them in float32, where 1 - (1 - 5e-9) is zero."""
    u = torch.arange(1001, dtype=torch.float64) / 1000
    bar = ((u + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    scheduler.betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)


# The largest difference of a pixel in [0, 1] or [-1, 1], by the precision of the tables.
TOLERANCES = {"as it is": 2e-3, "tables in double precision": 1e-4}


def pipeline_of(folder):
    """As the exported README says: diffusers' own loader does not find the module."""
    if not hasattr(diffusers.pipelines, "unclip"):
        from diffusers.pipelines.deprecated import unclip

        diffusers.pipelines.unclip = unclip
    return diffusers.UnCLIPPipeline.from_pretrained(folder)


@pytest.mark.parametrize("how", TOLERANCES)
@torch.no_grad()
def test_stock_diffusers_paints_the_same_pixels(how, karlo, monkeypatch):
    model, out = karlo
    cascade_ = load_cascade(model)
    batch = cascade_({"caption": CAPTIONS, "sample": torch.tensor([3, 4])}, 7)
    pipeline = pipeline_of(out)
    pipeline.set_progress_bar_config(disable=True)
    if how != "as it is":
        for name in ("prior", "decoder", "super_res"):
            in_double_precision(getattr(pipeline, f"{name}_scheduler"))
    draws = {
        (2, 24): Draws(7, "clip_image//noise", [3, 4]),
        (2, 3, 16, 16): Draws(7, "image_16//noise", [3, 4]),
        (2, 3, 64, 64): Draws(7, "image_64//noise", [3, 4]),
    }
    from diffusers.pipelines.deprecated.unclip import pipeline_unclip
    from diffusers.schedulers import scheduling_unclip

    for module in (pipeline_unclip, scheduling_unclip):
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: draws[tuple(shape)](tuple(shape)).float()
        )
    found = pipeline(
        CAPTIONS,
        prior_num_inference_steps=4,
        decoder_num_inference_steps=4,
        super_res_num_inference_steps=3,
        prior_guidance_scale=2.0,
        decoder_guidance_scale=2.5,
        output_type="np",
    ).images
    own = (batch["image_64"].clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
    assert own.std() > 0.05
    error = (torch.from_numpy(found) - own).abs().max().item()
    print(f"pipeline {how}: {error:.2e}")
    assert error < TOLERANCES[how]


@torch.no_grad()
def test_the_text_tower_is_that_of_the_cascade(karlo):
    model, out = karlo
    clip = FrozenCLIP(str(model / "clip"), unit=False)
    tower = transformers.CLIPTextModelWithProjection.from_pretrained(out / "text_encoder")
    ids = clip_tokenizer(20)(CAPTIONS, padding="max_length", return_tensors="pt")
    found, own = tower(ids.input_ids), clip.text(CAPTIONS)
    torch.testing.assert_close(found.text_embeds, own["clip_text"], **NEAR)
    states = found.last_hidden_state[:, : own["text"].shape[1]]
    mask = own["text_mask"][..., None]
    torch.testing.assert_close(states * mask, own["text"] * mask, **NEAR)


def test_the_folder_is_that_of_a_pipeline(karlo):
    _, out = karlo
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPPipeline"
    parts = {path.name for path in out.iterdir() if path.is_dir()}
    assert parts == {name for name in index if not name.startswith("_")}
    text = (out / "README.md").read_text()
    assert "decoder_num_inference_steps=4" in text
    assert "decoder_guidance_scale=2.5" in text


@pytest.mark.parametrize("how", TOLERANCES)
@torch.no_grad()
def test_a_stage_alone_leaves_as_a_network(how, tmp_path):
    """Super-resolution in ADM's layout, as `unclip_sr256` trains it, told a constant level."""
    run = tmp_path / "model/sr32"
    unet = [*SMALL, "net.norm.groups=8"]
    sr = ["experiment=karlo_sr256", "size=32", "low=16", "crop=null", *unet, "sampler.steps=3"]
    write_run(run, [*sr, "process=cosine_eps", "process.schedule.path=" + TABLE], 4)
    (tmp_path / "model/cascade.yaml").write_text("stages: {sr32: {}}\n")
    out = tmp_path / "out"
    command = ["export", "--model", str(tmp_path / "model"), "--format", "diffusers", "--out"]
    assert main([*command, str(out)]) == 0
    assert not (out / "model_index.json").exists()
    stage, small = Run(run).load(), torch.rand(2, 3, 16, 16) * 2 - 1
    own = stage.sample({"image_16": small, "sample": torch.tensor([3, 4])}, 7)
    net = diffusers.UNet2DModel.from_pretrained(out / "super_res_first")
    scheduler = diffusers.UnCLIPScheduler.from_pretrained(out / "super_res_scheduler")
    draw = Draws(7, "image_32//noise", [3, 4])
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
    x = draw((2, 3, 32, 32)).float()
    if how != "as it is":
        in_double_precision(scheduler)
    scheduler.set_timesteps(3)
    levels = [*scheduler.timesteps.tolist(), None]
    for t, before in pairwise(levels):
        eps = net(torch.cat([x, large], 1), t).sample
        with pytest.MonkeyPatch.context() as patch:
            name = "diffusers.schedulers.scheduling_unclip.randn_tensor"
            patch.setattr(name, lambda shape, **_: draw(tuple(shape)).float())
            x = scheduler.step(eps, t, x, prev_timestep=before).prev_sample
    error = (x.clamp(-1, 1) - own).abs().max().item()
    print(f"stage alone {how}: {error:.2e}")
    assert error < TOLERANCES[how]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("sr32: {sampler: ddim}", "sampler.solver=ddim|sr32: sampler=ddim"),
        ("sr32: {percentile: 0.9}", "percentile=0.9"),
    ],
)
def test_what_no_pipeline_does_is_refused(choice, message, tmp_path, capfd):
    run = tmp_path / "model/sr32"
    sr = ["experiment=karlo_sr256", "size=32", "low=16", "crop=null", *SMALL, "net.norm.groups=8"]
    write_run(run, sr, 4)
    (tmp_path / "model/cascade.yaml").write_text(f"stages: {{{choice}}}\n")
    command = ["export", "--model", str(tmp_path / "model"), "--format", "diffusers", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip()
    assert any(one in error for one in message.split("|"))
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_files_have_the_names_that_diffusers_looks_for(karlo):
    _, out = karlo
    state = load_file(out / "prior/diffusion_pytorch_model.safetensors")
    assert state["clip_mean"].shape == (1, 24)
    assert (out / "text_encoder/model.safetensors").exists()


@pytest.fixture(scope="module")
def again(karlo, tmp_path_factory):
    """What was exported, imported again."""
    folder = tmp_path_factory.mktemp("again") / "model"
    assert main(["import", "karlo", str(karlo[1]), "--out", str(folder)]) == 0
    return folder


def tensors(path):
    return load_file(path / "weights.safetensors" if path.is_dir() else path)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


NAMES = {"prior": "prior", "decoder": "decoder", "sr256": "sr64"}


@pytest.mark.slow
def test_a_round_trip_changes_no_bit(karlo, again, tmp_path):
    model, out = karlo
    for name, own in NAMES.items():
        assert_same(tensors(again / name), tensors(model / own))
    command = ["export", "--model", str(again), "--format", "diffusers"]
    assert main([*command, "--out", str(tmp_path / "second")]) == 0
    written = {path.relative_to(out) for path in out.rglob("*.safetensors")}
    assert len(written) == 6
    assert written == {p.relative_to(tmp_path / "second") for p in tmp_path.rglob("*.safetensors")}
    for path in written:
        assert_same(tensors(tmp_path / "second" / path), tensors(out / path))
    assert main(["export", "--model", str(again), "--out", str(tmp_path / "card")]) == 0
    batch = {"caption": CAPTIONS, "sample": torch.tensor([3, 4])}
    pictures = [load_cascade(m)(batch, 7)["image_64"] for m in (again, tmp_path / "card")]
    assert torch.equal(*pictures)


@pytest.mark.slow
def test_an_imported_network_trains_on_as_a_native_one_does(karlo, again, tmp_path):
    """20 steps on scenes: the same losses, which fall, and the same weights."""
    write_scenes(tmp_path / "shards", "plain", "train", 64, 64, 0)
    rest = [f"data.path={tmp_path / 'shards'}", "images=160", "batch=8", "warmup=8", "grids=0"]
    rest.append("crop=32")
    losses = {}
    for name, start in {"native": karlo[0] / "sr64", "imported": again / "sr256"}.items():
        run = tmp_path / name
        assert main(["train", f"start={start}", f"run={run}", *rest, "optim.lr=1e-3"]) == 0
        losses[name] = [float(row["loss"]) for row in Run(run).metrics()]
    assert losses["native"] == losses["imported"]
    assert_same(tensors(tmp_path / "native"), tensors(tmp_path / "imported"))
    trained, begun = tensors(tmp_path / "native"), tensors(karlo[0] / "sr64")
    assert any(not torch.equal(trained[key], begun[key]) for key in begun)
