"""What leaves for diffusers computes there what it computes here."""

import json
import math
import re

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


SLOW = {"every level", "blocks by level", "unclip_sr256", "unclip", "karlo", "adm_sr"}


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


@pytest.fixture
def draws(monkeypatch):
    """Lets the code of a README draw from streams by shape."""
    streams, plain = {}, torch.randn

    def randn(*shape, **_):
        (shape,) = shape if isinstance(shape[0], tuple) else (shape,)
        return streams[shape](shape).float() if shape in streams else plain(shape)

    from diffusers.pipelines.deprecated.unclip import pipeline_unclip
    from diffusers.schedulers import scheduling_ddpm, scheduling_unclip

    monkeypatch.setattr(torch, "randn", randn)
    for module in (pipeline_unclip, scheduling_unclip, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: randn(shape))
    return streams


EXAMPLES = ("captions = [", "labels = torch.tensor", "small = torch.zeros")


def readme_code(folder, instead=None, **given):
    """What the code of a folder's README computes; examples of what is given are left out.

    Args:
        instead: what replaces some of its text.
    """
    text, names = (folder / "README.md").read_text(), {"FOLDER": str(folder), **given}
    for old, new in (instead or {}).items():
        assert old in text
        text = text.replace(old, new)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        own = [line for line in code.split("\n") if not line.startswith(EXAMPLES)]
        exec("\n".join(own), names)
    return names


def off_by_the_last_step(scheduler):
    """The factor of x0 in the last step of stock `UnCLIPScheduler`, where exact tables give 1."""
    return (scheduler.betas[0] / (1 - scheduler.alphas_cumprod[0])).item()


@torch.no_grad()
def test_stock_diffusers_paints_the_same_pixels(karlo, draws):
    """By the code of the README, which computes the schedulers' tables in double precision."""
    model, out = karlo
    cascade_ = load_cascade(model)
    batch = cascade_({"caption": CAPTIONS, "sample": torch.tensor([3, 4])}, 7)
    own = (batch["image_64"].clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
    assert own.std() > 0.05
    draws[2, 24] = Draws(7, "clip_image//noise", [3, 4])
    draws[2, 3, 16, 16] = Draws(7, "image_16//noise", [3, 4])
    draws[2, 3, 64, 64] = Draws(7, "image_64//noise", [3, 4])
    example = '    "a red circle above a blue square",\n'
    found = readme_code(out, {example: f"    {CAPTIONS}, output_type='np',\n"})["images"]
    error = (torch.from_numpy(found) - own).abs().max().item()
    print(f"pipeline: {error:.2e}")
    assert error < 1e-4


@torch.no_grad()
def test_what_is_off_in_stock_schedulers_is_the_last_step_alone(karlo, draws):
    """betas[0] / (1 - alphas_cumprod[0]) is 1, and 5e-4 less in their float32 tables."""
    scheduler = diffusers.UnCLIPScheduler.from_pretrained(karlo[1] / "super_res_scheduler")
    factor = off_by_the_last_step(scheduler)
    assert 4e-4 < abs(factor - 1) < 2**-24 / 2 / 4.1e-5  # half of the spacing of floats below 1
    x, eps = torch.rand(1, 3, 8, 8) - 0.5, torch.zeros(1, 3, 8, 8)
    scheduler.set_timesteps(3)
    found = scheduler.step(eps, 0, x).prev_sample
    x0 = (x / cosine_bar(1).sqrt()).float()
    torch.testing.assert_close(found, factor * x0, rtol=1e-6, atol=0)
    scheduler.betas[0] = 1 - scheduler.alphas_cumprod[0]
    torch.testing.assert_close(scheduler.step(eps, 0, x).prev_sample, x0, rtol=1e-6, atol=0)


def cosine_bar(i):
    """The cumulative product of the first i alphas."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return torch.tensor(f(i / 1000) / f(0))


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


def write_vocabulary(folder):
    """GPT-2's two files, with all bytes alone."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir()
    letters = [*sorted(ByteLevel.alphabet()), "lo", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({x: i for i, x in enumerate(letters)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nl o\n")
    return folder


GLIDE = [
    *("text.size=32", "text.encoder.layers=2", "text.encoder.heads=2", "text.reader.length=12"),
    *("text.encoder.vocabulary=258", "net.width=32", "net.attention=[1]", "+net.head_channels=32"),
]
KARLO = "experiment=karlo_sr256_released"
SR_32 = ["size=32", "low=16", "crop=null"]
SCHEDULE = "process.schedule.path=cascade.diffusion.noise."
ADM = ["net.attention=[1]", "+net.head_channels=32", "classes=10"]
# Stages that leave alone: how they are trained and sampled here, and the size of their pictures.
ALONE = {
    "unclip": (["experiment=karlo_sr256", *SR_32, "sampler.steps=3"], 32),
    "karlo": ([KARLO, *SR_32, "sampler.steps=3"], 32),
    "adm": (["experiment=adm_released", "size=16", *ADM, "sampler.steps=5"], 16),
    "adm_sr": (["experiment=adm_sr_released", *SR_32, *ADM, "net.heads=2", "sampler.steps=5"], 32),
    "glide": (["experiment=glide_base64_released", "size=16", *GLIDE, "sampler.steps=5"], 16),
    "glide_sr": (["experiment=glide_sr256_released", *SR_32, *GLIDE], 32),
}


def write_alone(root, name, vocabulary):
    """A model of one stage."""
    own, _ = ALONE[name]
    unet = [*SMALL, "net.norm.groups=8"]
    unet = [x.replace("net.", "net.net.") for x in unet] if name == "karlo" else unet
    glide = [f"text.reader.folder={vocabulary}"] if "glide" in name else []
    write_run(root / name, [*own, *unet, *glide], 4)
    (root / "cascade.yaml").write_text(f"stages: {{{name}: {{}}}}\n")
    return root


@pytest.mark.parametrize("name", map(marked, ALONE))
@torch.no_grad()
def test_a_stage_alone_paints_the_same_pixels(name, tmp_path, draws):
    """By the code of the README: each scheduler, each way to enlarge, classes, GLIDE's text."""
    model = write_alone(tmp_path / "model", name, write_vocabulary(tmp_path / "pairs"))
    out, size = tmp_path / "out", ALONE[name][1]
    command = ["export", "--model", str(model), "--format", "diffusers", "--out"]
    assert main([*command, str(out)]) == 0
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    captions = ["3", "9"] if "adm" in name else ["A lot", "lower, and then lower it again"]
    batch = {"caption": captions, "sample": torch.tensor([3, 4]), "image_16": small}
    own = Run(model / name).load().sample(batch, 7)
    draws[2, 3, size, size] = Draws(7, f"image_{size}//noise", [3, 4])
    found = readme_code(out, captions=captions, labels=torch.tensor([3, 9]), small=small)
    error = (found["pictures"] - own).abs().max().item()
    print(f"{name} alone: {error:.2e}")
    assert own.std() > 0.05
    assert error < 1e-4
    if name == "adm":  # which is a kind of import as well
        words = ["diffusers", str(out / "adm/unet"), "--out", str(tmp_path / "again")]
        assert main(["import", *words]) == 0
        assert_same(tensors(tmp_path / "again"), tensors(model / name))


SR = ["experiment=karlo_sr256", *SR_32]
NOT_PADDED = ["experiment=glide_base64", "size=16", *GLIDE[1:4], *GLIDE[5:]]
NOT_PADDED += GLIDE[:1]
KARRAS = "+sampler.spacing={_target_: cascade.diffusion.spacing.karras, _partial_: true}"
SUMMED = [*NOT_PADDED, "+text.encoder.near=3"]


@pytest.mark.parametrize(
    ("own", "choice", "message"),
    [
        (SR, "{sampler: ddim}", "sampler=ddim"),
        (SR, "{percentile: 0.9}", "percentile=0.9"),
        ([*SR, "sampler=heun"], "{}", "sampler.solver=heun"),
        ([*SR, "sampler=few"], "{}", "sampler.solver=dpmpp_2m"),
        ([*SR, "sampler=ddim", KARRAS], "{}", "sampler.spacing=karras"),
        ([*SR, "sampler=ddim_dynamic"], "{}", "sampler.threshold=dynamic_threshold"),
        ([*SR, f"{SCHEDULE}cosine"], "{}", "process.schedule=cascade.diffusion.noise.cosine"),
        ([*SR, f"{SCHEDULE}linear_table"], "{}", "net.level.schedule=another table"),
        ([*ALONE["adm"][0], "net.positions=true"], "{}", "net.positions=true"),
        (ALONE["adm"][0], "{scale: 2}", "sampler.scale=2.0"),
        ([*ALONE["karlo"][0], "corruption=noise"], "{level: 0.3}", "level=0.3"),
        (NOT_PADDED, "{scale: 1}", "embedders.caption.encoder.padded=false"),
        (SUMMED, "{scale: 1}", "embedders.caption.encoder.near=3"),
    ],
)
def test_what_no_class_samples_is_refused(own, choice, message, tmp_path, capfd):
    unet = [*SMALL, "net.norm.groups=8"]
    unet = [x.replace("net.", "net.net.") for x in unet] if own[0] == KARLO else unet
    write_run(tmp_path / "model/one", [*own, *unet], 4)
    (tmp_path / "model/cascade.yaml").write_text(f"stages: {{one: {choice}}}\n")
    command = ["export", "--model", str(tmp_path / "model"), "--format", "diffusers", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err.strip()
    assert message in error
    assert "has no counterpart in diffusers" in error
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
