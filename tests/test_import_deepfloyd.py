"""DeepFloyd IF's stages, against the package of its authors, whole sampling runs included.

The package wants an old torch, so it is installed without its dependencies into a folder of its
own; without it these tests are skipped. Its loops draw from the stage's streams.
"""

import html
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.draws import Draws
from cascade.encoders.published.captions import cleaned
from cascade.encoders.text import FrozenT5
from tests.foreign import CAPTIONS, SAMPLES, batch, imported, noises, randomized, relative
from tests.test_text import write_t5

PACKAGE = (
    "deepfloyd-if==1.0.1 "
    "--hash=sha256:03c7af18464ffb844e1a63850c7bbbc628bef23f47daeda21ceaf96f3d27079b\n"
)
LENGTH, TEXT = 9, 16
PARAMS = {
    "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
    "channel_mult": "1,2", "attention_resolutions": "4", "activation": "gelu", "dropout": 0.0,
    "encoder_dim": TEXT, "att_pool_heads": 4, "encoder_channels": 32, "image_size": 8,
    "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
    "efficient_activation": True,
}  # fmt: skip
UPSAMPLER = {
    "in_channels": 6, "image_size": 16, "attention_resolutions": "8", "channel_mult": "1,2",
    "disable_self_attentions": "8", "scale_skip_connection": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """The authors' modules `unet` and `respace`."""
    folder = tmp_path_factory.mktemp("deepfloyd")
    (folder / "wanted.txt").write_text(PACKAGE)
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    words += ["--target", str(folder / "package"), "-r", str(folder / "wanted.txt")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"deepfloyd-if cannot be installed: {done.stderr.strip()[-200:]}")
    sys.path.insert(0, str(folder / "package"))
    try:
        from deepfloyd_if.model import respace, unet
    finally:
        sys.path.pop(0)
    return unet, respace


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


def written(net, params, folder):
    """IF's folder: config.yml and a plain state dict."""
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.safe_dump({"target": "x", "params": params}))
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder


def made(original, t5, kind, more, folder, *overrides):
    unet, respace = original
    params = {**PARAMS, **more}
    if kind == "if-1":
        net = unet.UNetModel(**params)
    else:
        diffusion = respace.create_gaussian_diffusion(
            steps=1000, learn_sigma=True, noise_schedule="cosine", timestep_respacing="1000"
        )
        net = unet.SuperResUNetModel(low_res_diffusion=diffusion, **params)
    net = randomized(net)
    source = written(net, params, folder / "weights")
    of_text = [f"text.reader.path_or_name={t5}", f"text.reader.length={LENGTH}"]
    of_text += ["text.reader.bf16=false"]
    return net, imported(kind, source, folder / "run", *of_text, *overrides)


@pytest.fixture(scope="module")
def base(original, t5, tmp_path_factory):
    more = "sampler=if_smart27"
    return made(original, t5, "if-1", {}, tmp_path_factory.mktemp("one"), more)


@pytest.fixture(scope="module")
def upsampler(original, t5, tmp_path_factory):
    more = "sampler=if_super27"
    return made(original, t5, "if-2", UPSAMPLER, tmp_path_factory.mktemp("two"), more)


def states(t5, captions):
    """T5's states padded to the full length, those of the padding included."""
    encoder = FrozenT5(str(t5), length=LENGTH, padded=True)
    found = encoder.text(captions)
    assert found["text"].shape == (len(captions), LENGTH, TEXT)
    assert found["text_mask"].all()
    return found["text"]


def loop(original, net, steps, scale, cap, draw, shape, text, **more):
    """IF's loop: the conditional half first, its variance, and the thresholds of its code."""
    diffusion = original[1].create_gaussian_diffusion(
        steps=1000, learn_sigma=True, noise_schedule="cosine", rescale_timesteps=True,
        rescale_learned_sigmas=True, timestep_respacing=steps,
    )  # fmt: skip

    def model(x, ts, **kwargs):
        half = x[: len(x) // 2]
        out = net(torch.cat([half, half]), ts, **kwargs)
        eps, rest = out[:, :3], out[:, 3:]
        own, null = eps.chunk(2)
        guided = null + scale * (own - null)
        return torch.cat([torch.cat([guided, guided]), rest], 1)

    x = draw(shape)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((2 * shape[0],), i)
        found = diffusion.p_mean_variance(
            model, torch.cat([x, x]), t, dynamic_thresholding_p=0.95, dynamic_thresholding_c=cap,
            model_kwargs={"text_emb": text, **more},
        )  # fmt: skip
        x = found["mean"][: shape[0]]
        if i > 0:
            x = x + (found["log_variance"][: shape[0]] / 2).exp() * draw(shape)
        x = x.float()
    return x


ORDINARY = [
    "A photo of a Red Panda, reading a book",
    "“Hello” — it’s a ‘sign’…",
    "  two   spaces\tand\na line ",
    'a corgi wearing a t-shirt that says "cascade"; oil on canvas, 4k',
    "Crème brûlée & coffee / tea (close-up)",
    "",
    "3 cats: one black, two white.",
]
OF_THE_WEB = [
    "Buy now at https://shop.example.com/item?id=3 free shipping",
    "see example.org/pictures by @some_user <b>bold</b> caption",
    "IMG_2034.jpg a sunset over the sea",
    "this_is_my_cute_cat_picture #123 #cats",
    "Poster 30x40 jc6640 page 12 click for details",
    "猫 a cat 192.168.0.1 1234567",
    "'quoted'",
    "a &amp; b &quot;c&quot; *** SOLD OUT ***",
]


@pytest.mark.parametrize("caption", [*ORDINARY, *OF_THE_WEB])
def test_captions_are_cleaned_as_by_diffusers(caption, monkeypatch):
    from diffusers.pipelines.deepfloyd_if import pipeline_if

    class Soup:
        """Stands in for BeautifulSoup, which is not installed: the text without its tags."""

        def __init__(self, text, features):
            self.text = html.unescape(re.sub(r"<[^>]*>", "", text))

    monkeypatch.setattr(pipeline_if, "BeautifulSoup", Soup, raising=False)
    theirs = pipeline_if.IFPipeline.__new__(pipeline_if.IFPipeline)
    assert cleaned(caption) == theirs._clean_caption(theirs._clean_caption(caption))


def test_the_reader_of_an_imported_stage_cleans(base):
    (reader,) = base[1].encoders
    raw, clean = reader.text(["A Red – circle "])["text"], reader.text(["a red - circle"])["text"]
    assert torch.equal(raw, clean)
    plain = FrozenT5(reader.name, length=LENGTH, padded=True)
    assert plain.hash != reader.hash


def test_single_calls_of_stage_one(base, t5):
    net, stage = base
    x, given = torch.randn(2, 3, 8, 8), stage.encoded(batch())
    with torch.no_grad():
        for t in (0, 500, 999):
            logsnr = stage.process.schedule(torch.tensor([(t + 1) / 1000]).double()).float()
            own = stage.net(x, logsnr.expand(2), stage.conditioner(given))
            null = stage.net(x, logsnr.expand(2), stage.conditioner.null(given))
            theirs = [
                net(x, torch.tensor([t, t]), states(t5, texts))
                for texts in (CAPTIONS, ["", ""])
            ]  # fmt: skip
            assert relative(own, theirs[0]) < 1e-5
            assert relative(null, theirs[1]) < 1e-5


@torch.no_grad()
def test_a_whole_run_of_stage_one(original, base, t5):
    """Guidance 7, thresholds of the 95 % quantile up to 1.5; smart27, for smart100."""
    net, stage = base
    counts = "7,4,2,1,2,4,7"
    text, draw = states(t5, [*CAPTIONS, "", ""]), noises(1, "image_8")
    theirs = loop(original, net, counts, 7.0, 1.5, draw, (2, 3, 8, 8), text)
    assert relative(stage.sample(batch(), seed=1), theirs.clamp(-1, 1)) < 1e-4


@torch.no_grad()
def test_a_whole_run_of_stage_two(original, upsampler, t5, monkeypatch):
    """Guidance 4, and fresh noise in the enlarged picture at each call and branch.

    In super27; the default is smart50, with the same thresholds.
    """
    net, stage = upsampler
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(8)) * 2 - 1
    augmentation = Draws(1, "image_16//augmentation", SAMPLES)
    plain = net.low_res_diffusion.q_sample

    def q_sample(x, t):
        eps = torch.cat([augmentation(tuple(half.shape)) for half in x.chunk(2)])
        return plain(x, t, noise=eps)

    monkeypatch.setattr(net.low_res_diffusion, "q_sample", q_sample)
    counts = "1,1,1,1,1,1,1,2,5,13"
    text, draw = states(t5, [*CAPTIONS, "", ""]), noises(1, "image_16")
    given = {"low_res": torch.cat([small, small]), "aug_level": 0.25}
    theirs = loop(original, net, counts, 4.0, 1.0, draw, (2, 3, 16, 16), text, **given)
    ours = stage.sample({**batch(), "image_4": small}, seed=1)
    assert relative(ours, theirs.clamp(-1, 1)) < 1e-4


@pytest.mark.parametrize(
    ("net", "millions"),
    [
        ("", 371.6),
        pytest.param("if_l", 935.4, marks=pytest.mark.slow),
        pytest.param("if_xl", 4304.7, marks=pytest.mark.slow),
    ],
)
def test_the_published_sizes(net, millions):
    sizes = {"": (192, 768), "if_l": (320, 1280), "if_xl": (704, 2816)}[net]
    more = [f"net.channels={sizes[0]}", f"net.embed={sizes[1]}", f"net.width={sizes[1]}"]
    config = composed("train", ["experiment=if_i_released", "data.path=none", *more])
    assert (config.sampler.steps, config.sampler.scale) == (100, 7.0)
    with torch.device("meta"):
        found = sum(p.numel() for p in built(config.stage).parameters())
    assert round(found / 1e6, 1) == millions


def of_diffusers(second):
    """Stage I or II as diffusers has it."""
    torch.manual_seed(0)
    return randomized(UNet2DConditionModel(
        sample_size=8, in_channels=6 if second else 3, out_channels=6, layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(32, 64),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        only_cross_attention=second, cross_attention_norm="group_norm", attention_head_dim=16,
        cross_attention_dim=32, encoder_hid_dim=TEXT, encoder_hid_dim_type="text_proj",
        addition_embed_type="text", addition_embed_type_num_heads=4, act_fn="gelu",
        class_embed_type="timestep" if second else None, time_embedding_act_fn="gelu",
        resnet_skip_time_act=True, resnet_time_scale_shift="scale_shift", time_embedding_dim=64,
        resnet_out_scale_factor=1 / 0.7071 if second else 1.0,
        mid_block_scale_factor=1 / 0.7071 if second else 1.0,
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["if-1", "if-2"])
def test_folders_of_diffusers_hold_the_same_networks(kind, t5, tmp_path):
    """Both stages; the second attends to text alone, and its level is an index."""
    second = kind == "if-2"
    net = of_diffusers(second)
    net.save_pretrained(tmp_path / "IF/unet")
    (tmp_path / "IF/model_index.json").write_text("{}")
    of_text = [f"text.reader.path_or_name={t5}", f"text.reader.length={LENGTH}"]
    of_text += ["text.reader.bf16=false"]
    stage = imported(kind, tmp_path / "IF", tmp_path / "run", *of_text)
    x, small = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 2, 2)
    given = stage.encoded({**batch(), "image_2": small, "image_2_level": torch.full((2,), 2.5)})
    large = F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=True)
    inputs = torch.cat([x, large], 1) if second else x
    labels = {"class_labels": torch.tensor([250, 250])} if second else {}
    logsnr = stage.process.schedule(torch.tensor([0.401]).double()).float().expand(2)
    with torch.no_grad():
        ours = stage.net(x, logsnr, stage.conditioner(given))
        theirs = net(inputs, 400, states(t5, CAPTIONS), **labels).sample
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_res_blocks": 2}, "has num_res_blocks=2, but the weights 1"),
        ({"activation": "silu"}, "has activation=silu: only gelu is imported"),
        (None, "holds no config.yml"),
    ],
)
def test_files_that_do_not_belong_together(change, says, base, tmp_path, capsys):
    source = written(base[0], {**PARAMS, **(change or {})}, tmp_path / "weights")
    if change is None:
        (source / "config.yml").unlink()
    assert main(["import", "if-1", str(source), "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"weights"}


def test_the_other_stage_is_refused(upsampler, tmp_path, capsys):
    source = written(upsampler[0], {**PARAMS, **UPSAMPLER}, tmp_path / "weights")
    assert main(["import", "if-1", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "which this network has no use for" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_cascade_paints_at_its_own_sizes(original, tmp_path):
    """Stages I and II and T5 from one folder, to 256 px."""
    unet, respace = original
    diffusion = respace.create_gaussian_diffusion(
        steps=1000, learn_sigma=True, noise_schedule="cosine", timestep_respacing="1000"
    )
    nets = {
        "IF-I-XL-v1.0": (unet.UNetModel, {}, {"image_size": 64, "attention_resolutions": "32"}),
        "IF-II-L-v1.0": (
            unet.SuperResUNetModel,
            {"low_res_diffusion": diffusion},
            {
                **UPSAMPLER,
                "image_size": 256,
                "attention_resolutions": "128",
                "disable_self_attentions": "128",
            },
        ),
    }
    folder = tmp_path / "if"
    folder.mkdir()
    for name, (network, more, sizes) in nets.items():
        params = {**PARAMS, **sizes}
        written(randomized(network(**more, **params)), params, folder / name)
    (folder / "t5-v1_1-xxl").mkdir()
    write_t5(folder / "t5-v1_1-xxl")
    model, out = tmp_path / "model", tmp_path / "out.png"
    words = ["import", "if", str(folder), "--out", str(model), "text.reader.bf16=false"]
    assert main(words) == 0
    few = [
        f"--set={name}.{one}" for name in ("base", "sr256") for one in ("sampler=ddim", "steps=2")
    ]
    assert main(["sample", "--model", str(model), CAPTIONS[0], "--out", str(out), *few]) == 0
    assert Image.open(out, formats=["PNG"]).size == (256, 256)
