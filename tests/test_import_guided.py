"""guided-diffusion's networks, in both orders of heads: diffusers' as ADM, whole sampling too."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.interop import guided
from tests.foreign import (
    SAMPLES,
    adm_names,
    imported,
    noises,
    p_sample_loop,
    randomized,
    relative,
    schedule,
    spaced,
)

LABELS = torch.tensor([3, 9])
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "num_class_embeds": 10}


def network(inputs, **more):
    torch.manual_seed(0)
    down = ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
    net = UNet2DModel(
        in_channels=inputs, out_channels=6, down_block_types=down, up_block_types=up,
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        norm_eps=1e-5, attn_norm_num_groups=32, **BLOCKS, **more,
    )  # fmt: skip
    return randomized(net)


def written(net, path, heads, legacy):
    """guided-diffusion's file; `legacy` interleaves queries, keys and values by head."""
    state = net.state_dict()
    own = adm_names(state, [1, 1], [False, True], [None, heads if legacy else 1])
    own["label_emb.weight"] = state["class_embedding.weight"]
    torch.save(own, path)
    return path


def batch(**more):
    return {"caption": ["3", "9"], "sample": torch.tensor(SAMPLES), **more}


@pytest.fixture(scope="module")
def of_64(tmp_path_factory):
    """The order and the heads' width of the network of 64 px, at 8 px."""
    folder, net = tmp_path_factory.mktemp("adm"), network(3, sample_size=8, attention_head_dim=16)
    path = written(net, folder / "64x64_diffusion.pt", 4, legacy=False)
    facts = guided.Facts((8,), {"head_channels": 16}, legacy=False, linear=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(guided.PUBLISHED, guided.Sizes(32, (1, 2), (1,)), facts)
        return net, imported("guided-diffusion", path, folder / "run", "sampler.steps=6")


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory):
    """The order and the number of heads of the network from 64 to 256 px, from 4 to 16 px."""
    folder, net = tmp_path_factory.mktemp("adm"), network(6, sample_size=16, attention_head_dim=32)
    path = written(net, folder / "64_256_upsampler.pt", 2, legacy=True)
    with pytest.MonkeyPatch.context() as patch:
        facts = guided.Facts((4, 16), {"heads": 2})
        patch.setitem(guided.PUBLISHED, guided.Sizes(32, (1, 2), (1,), 3), facts)
        return net, imported("guided-diffusion", path, folder / "run", "sampler.steps=6")


@torch.no_grad()
@pytest.mark.parametrize("which", ["of_64", "upsampler"])
def test_a_whole_run_and_its_calls(which, request):
    net, stage = request.getfixturevalue(which)
    size = stage.codec.size
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    small = ((small + 1) * 127.5).round() / 127.5 - 1  # a picture of 8 bits
    more = {} if which == "of_64" else {"image_4": small}
    picture = F.interpolate(small, (16, 16), mode="bilinear") if more else None
    given = stage.encoded(batch(**more, image_4_level=torch.zeros(2)))
    x = torch.randn(2, 3, size, size)
    for t in (0, 500, 999):
        logsnr = stage.process.schedule(torch.tensor([(t + 1) / 1000]).double()).float()
        ours = stage.net(x, logsnr.expand(2), stage.conditioner(given))
        theirs = net(x if picture is None else torch.cat([x, picture], 1), t, LABELS).sample
        assert relative(ours, theirs) < 1e-5

    def model(x, t):
        inputs = x if picture is None else torch.cat([x, picture], 1)
        return net(inputs, t, LABELS).sample.chunk(2, 1)

    bars = schedule(DDPMScheduler(), linear=bool(more)).alphas_cumprod
    draw = noises(1, f"image_{size}")
    theirs = p_sample_loop(model, bars, spaced(6), draw, (2, 3, size, size))
    assert relative(stage.sample(batch(**more), seed=1), theirs.clamp(-1, 1)) < 1e-4


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((192, (1, 2, 3, 4), (1, 2, 3)), 295_904_454),
        pytest.param((192, (1, 1, 2, 2, 4, 4), (3, 4, 5), 3), 311_795_910, marks=pytest.mark.slow),
        pytest.param((192, (1, 1, 2, 2, 4, 4), (4, 5), 3), 308_835_270, marks=pytest.mark.slow),
    ],
)
def test_the_published_sizes(sizes, count):
    own = guided.Sizes(*sizes)
    facts = guided.PUBLISHED[own]
    shown = {**own._asdict(), **facts.heads, "blocks": 2 if own.image_channels else 3}
    settings = [f"++net.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in shown.items()]
    name = "adm_sr_released" if own.image_channels else "adm_released"
    config = composed("train", [f"experiment={name}", "data.path=none", *settings])
    assert config.sampler.steps == 250
    with torch.device("meta"):
        assert sum(p.numel() for p in built(config.stage).parameters()) == count


def test_unknown_sizes_and_classes_are_one_line(tmp_path, capsys):
    net = network(3, sample_size=8, attention_head_dim=16)
    path = written(net, tmp_path / "model.pt", 4, legacy=False)
    assert main(["import", "guided-diffusion", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "none that guided-diffusion published" in capsys.readouterr().err
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "label_emb.weight"}, path)
    assert main(["import", "guided-diffusion", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "has no label_emb.weight" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"model.pt"}


def test_a_caption_that_is_no_class_is_refused(of_64):
    with pytest.raises(Exception, match="caption 'ten' is no class: give a number from 0 to 9"):
        of_64[1].encoded({**batch(), "caption": ["3", "ten"]})
