"""The transformer on pixels: its positions, size and condition, its process, and a training."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file

from cascade import cli
from cascade.conditioning import Cond
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion import weighting
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.noise import alpha_sigma, uniform
from cascade.diffusion.prediction import eps, flow, x0
from cascade.errors import UserError
from cascade.eval.sweeps.plan import describe, joined
from cascade.nets.jit import JiT, angles, turned
from cascade.runs.cascade_file import stage_runs
from cascade.training.rehearsal import rehearsed


def small(**more):
    torch.manual_seed(0)
    net = JiT(16, 2, 16, 4, 8, bottleneck=8, width=6, **more)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_attention_sees_differences_of_places_alone():
    """The product of a query and a key depends on how many rows and columns lie between them."""
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=random)
    by = angles(5, 7, 16, torch.device("cpu")).double()
    every = [turned(x.expand(1, 1, 35, 16), by)[0, 0].unflatten(0, (5, 7)) for x in (q, k)]
    queries, keys = every
    products = torch.einsum("abc,dec->abde", queries, keys)
    torch.testing.assert_close(products[1, 2, 3, 4], products[2, 3, 4, 5])
    torch.testing.assert_close(products[0, 0, 0, 0], (q * k).sum())
    assert abs(products[1, 2, 3, 4] - products[2, 2, 3, 4]) > 1e-3
    assert abs(products[1, 2, 3, 4] - products[1, 3, 3, 4]) > 1e-3
    # As complex numbers: the first pair turns by one radian per row, the fifth per column.
    pair = torch.view_as_complex(torch.stack([q[0, 0, 0, [0, 4]], q[0, 0, 0, [8, 12]]], -1))
    moved = pair * torch.exp(1j * torch.tensor([3.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(queries[3, 2, [0, 4]], moved.real)
    torch.testing.assert_close(queries[3, 2, [8, 12]], moved.imag)


@pytest.mark.parametrize(("name", "published"), [("jit_b16", 131e6), ("jit_l16", 459e6)])
def test_the_published_sizes(name, published):
    """JiT counts a class's embedding and no keys and values of texts."""
    config = composed("train", ["data.path=none", "stage=decoder_text", f"net={name}"])
    with torch.device("meta"):
        net = built(config.net)
    ours = sum(p.numel() for key, p in net.named_parameters() if ".kv." not in key)
    assert ours == pytest.approx(published, rel=0.01)


def test_it_reads_every_port_and_no_hidden_token():
    net, random = small(image_channels=3), torch.Generator().manual_seed(1)
    x, image = torch.randn(2, 2, 3, 8, 12, generator=random)
    cond = Cond(
        torch.randn(2, 16, generator=random),
        torch.randn(2, 3, 6, generator=random),
        torch.tensor([[True, True, False], [True, False, False]]),
        image,
    )
    logsnr = torch.tensor([0.5, -1.0])
    before = net(x, logsnr, cond)
    assert before.shape == x.shape
    changed = {"vector": cond.vector + 1, "image": image + 1}
    for port, value in changed.items():
        other = net(x, logsnr, Cond(**{**vars(cond), port: value}))
        assert (other - before).abs().flatten(1).max(1).values.min() > 1e-4
    tokens = cond.tokens.clone()
    tokens[:, 2] += 1  # hidden
    assert torch.equal(net(x, logsnr, Cond(**{**vars(cond), "tokens": tokens})), before)
    tokens[0, 1] += 1
    other = net(x, logsnr, Cond(**{**vars(cond), "tokens": tokens}))
    assert not torch.equal(other[0], before[0])
    torch.testing.assert_close(other[1], before[1])
    assert not torch.equal(net(x, logsnr + 1, cond), before)
    torch.testing.assert_close(net(x[:1], logsnr[:1], Cond(image=image[:1])).shape, x[:1].shape)


def test_patches_are_those_of_the_picture():
    """A network of no blocks whose layers copy returns each pixel to its place."""
    net = JiT(48, 0, 8, 4, bottleneck=48)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for layer in (*net.embed_in, net.embed_out):
            layer.weight.copy_(torch.eye(48))
        net.norm_out.weight.fill_(1)
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    patches = x.unflatten(3, (3, 4)).unflatten(2, (2, 4))
    size = patches.square().mean((1, 3, 5), keepdim=True).sqrt()
    expected = (patches / size).flatten(4).flatten(2, 3)
    found = net(x, torch.zeros(2), Cond())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_width_that_positions_cannot_turn_is_refused():
    with pytest.raises(UserError, match="is no multiple of 4"):
        JiT(20, 1, 8, 4, 10)
    with pytest.raises(UserError, match="are not a multiple of head_channels=8"):
        JiT(20, 1, 8, 4, 8)


def test_the_loss_is_that_of_the_velocity_at_logit_normal_times():
    """In JiT's own terms: z = t x + (1 - t) eps, v = (x_hat - z) / (1 - t), 1 - t at least 0.05."""
    process = built(composed("train", ["data.path=none", "process=jit_x0"]).process)
    random = torch.Generator().manual_seed(0)
    clean, noise, guess = torch.randn(3, 6, 5, dtype=torch.float64, generator=random)
    t = torch.tensor([0.02, 0.2, 0.4, 0.6, 0.9, 0.99], dtype=torch.float64)
    logsnr = 2 * torch.logit(t)
    x, wanted = process.task(clean, noise, logsnr)
    z = t[:, None] * clean + (1 - t[:, None]) * noise
    scale = sum(alpha_sigma(logsnr))[:, None]
    torch.testing.assert_close(x, z * scale)
    assert torch.equal(wanted, clean)
    velocities = [(found - z) / (1 - t[:, None]).clamp(min=0.05) for found in (guess, clean)]
    expected = (velocities[0] - velocities[1]).square().mean(1)
    torch.testing.assert_close(process.weighted(guess - wanted, logsnr), expected)
    draws = torch.randn(10**5, generator=random)
    times = torch.sigmoid(process.schedule(uniform(lambda shape: draws, (10**5,))) / 2)
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)


PREDICTIONS = {"x0": x0, "eps": eps, "flow": flow}
SPACES = {"x0": weighting.x0, "eps": weighting.eps, "flow": weighting.flow}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_pair_is_the_error_of_one_quantity_told_by_another(prediction, space):
    process = Diffusion(prediction=PREDICTIONS[prediction], weight=SPACES[space])
    random = torch.Generator().manual_seed(0)
    clean, noise, output = torch.randn(3, 4, 5, dtype=torch.float64, generator=random)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)[:, None]
    z = t * clean + (1 - t) * noise
    told = {  # x0 by each quantity
        "x0": output,
        "eps": (z - (1 - t) * output) / t,
        "flow": z - (1 - t) * output,  # of eps - x0
    }[prediction]
    asked = {
        "x0": lambda x: x,
        "eps": lambda x: (z - t * x) / (1 - t),
        "flow": lambda x: (x - z) / (1 - t),
    }[space]
    _, wanted = process.task(clean, noise, 2 * torch.logit(t[:, 0]))
    found = process.weighted(output - wanted, 2 * torch.logit(t[:, 0]))
    torch.testing.assert_close(found, (asked(told) - asked(clean)).square().mean(1))
    bounded = Diffusion(prediction=PREDICTIONS[prediction], weight=SPACES[space], most=2.0)
    error = (output - wanted).square().mean(1)
    torch.testing.assert_close(
        bounded.weighted(output - wanted, 2 * torch.logit(t[:, 0])), torch.minimum(found, 2 * error)
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 32, seed=0, shard_size=10)
    return folder


NET = ["net=jit_tiny", "net.channels=16", "net.depth=2", "net.head_channels=8", "net.patch=4"]
NET += ["net.embed=16", "net.bottleneck=8", "process=jit_x0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        ["stage=decoder_text", "net.width=16", "text.size=16", "text.encoder.layers=1"],
        ["stage=sr256", "low=8", "crop=null", "+net.image_channels=3"],
    ],
    ids=["decoder", "sr"],
)
def test_it_trains_and_samples_as_any_network(stage, shards, tmp_path):
    given = [*stage, *NET, "size=16", "batch=4", "images=80", "warmup=8", "grids=1"]
    out = tmp_path / "run"
    more = ["sampler.steps=2", "text.encoder.embed=4"] if "low=8" not in stage else []
    assert cli.main(["train", *given, *more, f"data.path={shards}", f"run={out}"]) == 0
    weights = load_file(out / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["net.embed_out.weight"].any()
    assert len(list((out / "samples").glob("0*.png"))) == 1
    assert math.isfinite(float((out / "metrics.csv").read_text().splitlines()[-1].split(",")[1]))


@pytest.mark.slow
def test_what_the_sweep_compares_has_the_same_training_flops():
    config = composed("sweep", ["sweep=transformer"])

    def flops(overrides):
        stage, rehearsal = rehearsed(overrides)
        return rehearsal.step().flops * stage.images

    spent = {kind: flops(joined(config.base, own)) for kind, own in config.axes.kind.items()}
    spent["cascade"] += flops(list(config.shared.sr64))
    assert spent["unet"] == pytest.approx(spent["cascade"], rel=0.02)
    assert spent["transformer"] == pytest.approx(spent["cascade"], rel=0.02)


def test_points_of_a_sweep_may_have_other_stages(tmp_path):
    config = composed("sweep", ["sweep=transformer", f"home={tmp_path}", "run=${home}/x"])
    describe(config, tmp_path / "x")
    runs = {
        kind: {
            name: os.path.normpath(path)
            for name, path in stage_runs(tmp_path / "x" / f"{kind}-s0" / "cascade.yaml").items()
        }
        for kind in ("cascade", "transformer")
    }
    own = {kind: str(tmp_path / "x" / f"{kind}-s0" / "decoder") for kind in runs}
    assert runs["cascade"] == {"decoder": own["cascade"], "sr64": str(tmp_path / "sr64")}
    assert runs["transformer"] == {"decoder": own["transformer"]}
