"""Latent stages: scaling from data, foreign autoencoders, tiles, and a whole small training."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.guidance import static_threshold
from cascade.edit.operations import paint_unknown
from cascade.errors import UserError
from cascade.eval.cascades.protocol import HeldOut
from cascade.eval.cascades.reconstruction import reconstruction
from cascade.eval.sweeps.plan import joined
from cascade.latents.autoencoder import Architecture
from cascade.latents.codec import Latent
from cascade.latents.frozen import FrozenAutoencoder, save_autoencoder
from cascade.latents.tiles import spans, tiled
from cascade.pipeline import Cascade
from cascade.runs.model import frame_asked, load_cascade, paint
from cascade.runs.run import Run
from cascade.training.rehearsal import rehearsed

STAGE = [
    "experiment=latent_tiny", "stage=decoder_text", "sketch=tiny", "size=16", "batch=4",
    "warmup=8", "grids=0", "ema=0.9", "net.channels=8", "net.embed=16", "net.blocks=1",
    "net.width=32", "net.head_channels=8", "sampler.steps=2", "stage.conditioner.sketch.size=4",
    "text.size=16", "text.encoder.layers=1", "text.encoder.embed=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Scenes, a CLIP and an untrained autoencoder."""
    folder = tmp_path_factory.mktemp("home")
    write_scenes(folder / "shards", "plain", "train", 20, 16, seed=0, shard_size=10)
    torch.manual_seed(0)
    sizes = Architecture(channels=8, multipliers=[1, 2], latent=4, factor=4)
    (folder / "autoencoder").mkdir()
    save_autoencoder(sizes, sizes.build(), folder / "autoencoder")
    return folder


def pictures(count, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def codec(folder, **more):
    return Latent(16, 4, 4, FrozenAutoencoder(str(folder)), **more)


def test_latents_are_painted_as_squares_alone(home):
    link = {"writes": "image_16", "encoded": dict, "sample": dict}
    cascade = Cascade([SimpleNamespace(codec=codec(home / "autoencoder"), **link)])
    with pytest.raises(UserError, match="the stage that writes image_16 was trained on squares"):
        frame_asked(cascade, "3:2", 1)


def test_latents_have_zero_mean_and_unit_variance_after_fit(home):
    found = codec(home / "autoencoder")
    batches = [{"image_16": pictures(8, seed=i)} for i in range(3)]
    found.fit(batches)
    weights = Architecture(channels=8, multipliers=[1, 2], latent=4, factor=4).build()
    weights.load_state_dict(load_file(home / "autoencoder" / "autoencoder.safetensors"))
    with torch.no_grad():
        raw = torch.cat([weights.posterior(batch["image_16"]).mean for batch in batches])
    rows = raw.double().movedim(1, 3).reshape(-1, 4).numpy()
    np.testing.assert_allclose(found.mean.numpy(), np.mean(rows, 0), atol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), np.std(rows, 0), rtol=1e-5)
    x0 = torch.cat([found.encode(batch) for batch in batches])
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-5, rtol=0)
    assert list(found.state_dict()) == ["mean", "std"]  # and nothing of the autoencoder
    with torch.no_grad():
        expected = weights.decode(raw[:8]).clamp(-1, 1)
    torch.testing.assert_close(found.decode(x0[:8]), expected, atol=1e-5, rtol=1e-5)
    assert found.shape({}) == (4, 4, 4)


def test_drawn_latents_vary_with_the_sample_in_training_alone(home):
    found, batch = (
        codec(home / "autoencoder", drawn=True),
        {"image_16": pictures(1).repeat(2, 1, 1, 1)},
    )
    batch["sample"] = [3, 4]
    one, other = found.encode(batch)
    again = found.encode({**batch, "sample": [4, 3]})
    assert not torch.equal(one, other)
    assert torch.equal(again[0], other)
    posterior = found.autoencoder.posterior(batch["image_16"])
    many = torch.cat([found.encode({**batch, "sample": [i, i + 1]}) for i in range(0, 400, 2)])
    torch.testing.assert_close(many.std(0), posterior.std[0], rtol=0.2, atol=0)
    found.eval()
    assert torch.equal(found.encode(batch)[0], posterior.mean[0])


FOREIGN = {
    "AutoencoderKL": {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": [8, 16, 16],
        "decoder_block_out_channels": [8, 16, 16],
        "encoder_layers_per_block": [1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1],
        "encoder_block_types": ["ResBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3,
        "encoder_qkv_multiscales": [[], [], []],
        "decoder_qkv_multiscales": [[], [], []],
        "latent_channels": 4,
        "attention_head_dim": 8,
    },
}


def foreign(kind, folder):
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**FOREIGN[kind]).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", FOREIGN)
def test_an_autoencoder_of_diffusers_computes_the_same(kind, tmp_path):
    theirs = foreign(kind, tmp_path)
    found, x = codec(tmp_path), pictures(6)
    found.check()
    found.fit([{"image_16": x}])
    z = theirs.encode(x).latent if kind == "AutoencoderDC" else theirs.encode(x).latent_dist.mode()
    rows = z.double().movedim(1, 3).reshape(-1, 4)
    mean, std = rows.mean(0).float(), rows.std(0, correction=0).float()
    scaled = (z - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(found.encode({"image_16": x}), scaled, atol=1e-5, rtol=1e-5)
    expected = theirs.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(found.decode(scaled), expected, atol=1e-5, rtol=0)


def test_weights_of_another_autoencoder_are_refused(tmp_path):
    foreign("AutoencoderKL", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "conv_in" not in k}, file)
    with pytest.raises(UserError, match="does not hold the weights"):
        FrozenAutoencoder(str(tmp_path)).posterior(pictures(1))


def test_tiles_of_a_local_decoder_are_its_picture():
    """Away from seams each pixel is decoded as a whole; without a context everywhere."""
    z = pictures(2, 40)[:, :, :33]
    enlarge = torch.nn.Upsample(scale_factor=4)
    torch.testing.assert_close(tiled(enlarge, z, 16, 4), enlarge(z))
    blur = torch.nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        whole, parts = blur(z), tiled(blur, z, 16, 4)
    seams = {place for span in spans(40, 16, 4) for place in (span.start, span.stop - 1)} - {0, 39}
    inside = [i for i in range(40) if i not in seams]
    torch.testing.assert_close(parts[:, :, :12, inside], whole[:, :, :12, inside])
    assert not torch.allclose(parts, whole)


def test_tiles_cover_a_side_and_overlap():
    for side in (16, 17, 29, 40, 100):
        found = list(spans(side, 16, 4))
        assert (found[0].start, found[-1].stop) == (0, side)
        assert all(span.stop - span.start == 16 for span in found)
        assert all(a.stop - b.start >= 4 for a, b in pairwise(found))


def test_large_latents_are_decoded_in_tiles(home):
    """What a decoder holds at a time does not grow with the picture."""
    most = []
    found = FrozenAutoencoder(str(home / "autoencoder"), tile=16, overlap=8)
    found._model.decoder[0].register_forward_hook(lambda _, x, y: most.append(y.numel()))
    z = torch.randn(1, 4, 16, 48, generator=torch.Generator().manual_seed(0))
    in_tiles = found.decode(z)
    assert max(most) == most[0] == 16 * 16 * 16
    found.tile = 48
    whole = found.decode(z)
    assert most[-1] == 3 * most[0]
    # Group norms see a tile in place of the picture, so the two agree but roughly.
    assert (in_tiles - whole).square().mean() < 0.05 * whole.var()
    assert in_tiles.shape == (1, 3, 64, 192)


def test_a_training_and_its_pictures(home, tmp_path):
    """20 steps; the statistics are exported, a moved run finds its autoencoder, and it paints."""
    shutil.copytree(home / "autoencoder", tmp_path / "autoencoder")
    asked = [*STAGE, "images=80", f"data.path={home / 'shards'}", f"run={tmp_path / 'latent'}"]
    assert cli.main(["train", *asked, f"autoencoder.path={tmp_path / 'autoencoder'}"]) == 0
    weights = load_file(tmp_path / "latent" / "weights.safetensors")
    assert not [key for key in weights if "autoencoder" in key]
    assert weights["codec.std"].min() > 0
    assert not torch.equal(weights["codec.std"], torch.ones(4))
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    (moved / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": {"latent": {}}}))
    cascade = load_cascade(moved)
    painted = paint(cascade, ["a red circle", "a blue square"], seed=0)["image_16"]
    assert painted.shape == (2, 3, 16, 16)
    assert painted.std() > 0
    given = {"sample": torch.tensor([0, 1]), "caption": ["a red circle", "a blue square"]}
    for unknown in (False, True):  # where nothing is unknown, a picture is only reconstructed
        masks = torch.full((2, 1, 16, 16), unknown)
        masked = {"known/image_16": pictures(2), "unknown/image_16": masks}
        found = paint_unknown(cascade, given | masked, seed=0, jumps=1)["image_16"]
        own = cascade.stages[0].codec
        expected = own.decode(own.encode({"image_16": pictures(2)}))
        assert torch.allclose(found, expected, atol=1e-5) != unknown
    with pytest.raises(UserError, match="sampler=latent"):
        load_cascade(moved, ["latent.sampler=ddim"])
    data = HeldOut(["a", "b"], {"image_16": pictures(2)})
    stage = cascade.stages[0]
    back = stage.codec.decode(stage.codec.encode(data.truth))
    error = (back - pictures(2)).square().flatten(1).mean(1)
    found = reconstruction(Cascade([stage]), data)["image_16"]
    assert found["psnr"] == pytest.approx((10 * torch.log10(4 / error)).mean().item(), abs=1e-4)
    other = moved / "autoencoder" / "autoencoder.safetensors"
    save_file({k: v + 1 for k, v in load_file(other).items()}, other)
    with pytest.raises(UserError, match="another encoder"):
        Run(moved / "latent").load()


def test_an_exported_model_has_its_autoencoder(home, tmp_path, capsys):
    config = composed(
        "train",
        [*STAGE, f"autoencoder.path={home / 'autoencoder'}", "data.path=none", "run=none"],
    )
    (tmp_path / "m" / "latent").mkdir(parents=True)
    OmegaConf.save(config, tmp_path / "m" / "latent" / "config.yaml")
    torch.manual_seed(0)
    stage = built(config.stage)
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stage.codec.fit([{"image_16": pictures(8)}])
    stage.export(tmp_path / "m" / "latent")
    (tmp_path / "m" / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": {"latent": {}}}))
    assert cli.main(["export", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "m")
    held = json.loads((tmp_path / "out" / "autoencoder" / "autoencoder.json").read_text())
    assert held["latent"] == 4
    moved = tmp_path / "out"
    painted = paint(load_cascade(moved), ["a red circle"], seed=0)["image_16"]
    cond = {"caption": ["a red circle"], "sample": torch.tensor([0])}
    torch.testing.assert_close(painted, stage.eval().sample(cond, 0), atol=1e-5, rtol=1e-5)
    assert "an autoencoder" in (moved / "README.md").read_text()


def wrong(home, tmp_path):
    """Overrides and what is said of them; and folders that hold something else."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return {
        "size=18": "size=18 is no multiple of autoencoder.factor=4",
        "net.pixels=3": "net.pixels=3, but the latents of",
        "autoencoder.latent=8": "autoencoder.latent=8, but that of",
        "sampler=ddim": "choose sampler=latent",
        f"autoencoder.path={tmp_path / 'empty'}": "holds no autoencoder",
        f"autoencoder.path={tmp_path / 'unet'}": "describes UNet2DModel",
        f"autoencoder.path={tmp_path / 'none'}": "is not there",
    }


def test_what_does_not_fit_is_refused(home, tmp_path, capsys):
    for override, said in wrong(home, tmp_path).items():
        asked = [*STAGE, f"autoencoder.path={home / 'autoencoder'}", override]
        asked = list({o.partition("=")[0]: o for o in asked}.values())
        asked += [f"data.path={home / 'shards'}", f"run={tmp_path / 'run'}"]
        assert cli.main(["train", *asked]) == 2, override
        found = capsys.readouterr().err
        assert said in found
        assert found.count("\n") == 1
        assert not list((tmp_path / "run").glob("*.yaml"))


def test_a_stage_without_its_autoencoder_can_be_described(capsys):
    assert cli.main(["describe", *STAGE, "autoencoder.path=nowhere"]) == 0
    assert "GFLOP" in capsys.readouterr().out


def test_a_threshold_is_for_pixels():
    config = composed("train", [*STAGE, "data.path=none", "autoencoder.path=none"])
    stage = built(config.stage)
    stage.codec.check_sampler(stage.sampler)
    with pytest.raises(UserError, match="threshold"):
        stage.codec.check_sampler(replace(stage.sampler, threshold=static_threshold))


@pytest.mark.slow
def test_what_the_sweep_compares_has_the_same_training_flops():
    """Those of super-resolution, of the autoencoder and of its frozen encoder included."""
    config = composed("sweep", ["sweep=latent"])

    def flops(overrides):
        stage, rehearsal = rehearsed(overrides)
        return rehearsal.step().flops * stage.images

    spent = {kind: flops(joined(config.base, own)) for kind, own in config.axes.kind.items()}
    latent = composed("train", ["data.path=none", *joined(config.base, config.axes.kind.latent)])
    net, size = built(latent.autoencoder.model).build(), latent.size
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        net.posterior(torch.zeros(1, 3, size, size))
    spent["latent"] += encoding.get_total_flops() * latent.images
    spent["latent"] += flops(list(config.shared.autoencoder))
    spent["cascade"] += flops(list(config.shared.sr64))
    assert spent["latent"] == pytest.approx(spent["cascade"], rel=0.02)
