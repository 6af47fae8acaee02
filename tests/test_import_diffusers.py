"""U-Nets in diffusers' format that are told classes, and what cannot be represented."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from cascade.cli import main
from cascade.interop.diffusers_unets import unet_config
from tests.foreign import SAMPLES, imported, randomized, relative

KINDS = {
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 16,
        "resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-5,
        "attn_norm_num_groups": 32,
    },
    "ddpm": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None, "norm_eps": 1e-6,
    },
}  # fmt: skip


def network(**more):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(32, 64),
        layers_per_block=2, num_class_embeds=10, **more,
    )  # fmt: skip
    return randomized(net)


def folder(net, path, **scheduler):
    net.save_pretrained(path / "unet")
    DDPMScheduler(**scheduler).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text("{}")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_told_classes_is_the_same(kind, tmp_path):
    """Both ways to resample, and both ways to read the noise level's embedding."""
    net = network(**KINDS[kind])
    stage = imported("diffusers", folder(net, tmp_path / "pipeline"), tmp_path / "run")
    given = stage.encoded({"caption": ["3", "9"], "sample": torch.tensor(SAMPLES)})
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 9])
    with torch.no_grad():
        for t in (0, 700):
            logsnr = stage.process.schedule(torch.tensor([(t + 1) / 1000]).double()).float()
            ours = stage.net(x, logsnr.expand(2), stage.conditioner(given))
            assert relative(ours, net(x, t, labels).sample) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"freq_shift": 1}, "has freq_shift=1; only 0 can be imported"),
        ({"act_fn": "mish"}, "has act_fn=mish"),
        ({"num_class_embeds": None}, "only networks that are told classes"),
        ({"add_attention": False}, "attends in the middle and not at the last level"),
        ({"mid_block_scale_factor": 2}, "but in the middle by 2"),
    ],
)
def test_what_is_not_represented_is_one_line(change, says, tmp_path, capsys):
    source = folder(network(**KINDS["adm"]), tmp_path / "pipeline") / "unet"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    assert main(["import", "diffusers", str(source), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_noise_levels_must_be_known(tmp_path, capsys):
    source = folder(network(**KINDS["adm"]), tmp_path / "pipeline", prediction_type="v_prediction")
    assert main(["import", "diffusers", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "predicts v_prediction, which is not imported" in capsys.readouterr().err
    (source / "scheduler/scheduler_config.json").unlink()
    assert main(["import", "diffusers", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "without which the noise levels are unknown" in capsys.readouterr().err


def test_the_configuration_of_ifs_networks_is_read(tmp_path):
    """GELU, scaled sums, attention to text alone, tokens that are normalised."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=32, in_channels=6, out_channels=6, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=[1, 2],
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        only_cross_attention=True, cross_attention_norm="group_norm", attention_head_dim=16,
        cross_attention_dim=32, act_fn="gelu", resnet_skip_time_act=True,
        time_embedding_act_fn="gelu", resnet_out_scale_factor=1.414,
        mid_block_scale_factor=1.414, resnet_time_scale_shift="scale_shift",
    ).save_pretrained(tmp_path)  # fmt: skip
    net = unet_config(tmp_path)[1]
    assert net["blocks"] == [1, 2]
    assert net["text_alone"]
    assert net["token_groups"] == 32
    assert net["activation._target_"] == "torch.nn.GELU"
    assert net["block_scale"] == pytest.approx(0.7072, abs=1e-4)
