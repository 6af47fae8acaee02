"""Whole cascades with their encoders, and stages of one's own beside imported ones."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cascade.cli import main
from cascade.config.compose import composed, saved
from cascade.data.precompute import about_pictures
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.text import tokenize
from cascade.errors import UserError
from cascade.runs.agreement import check_rows
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from tests.foreign import CAPTIONS, randomized, relative, small_clip

DIM, LENGTH = 24, 20
UP = {"block_out_channels": (32, 64), "layers_per_block": 1}


def text_model(act="quick_gelu"):
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=DIM, intermediate_size=4 * DIM, projection_dim=DIM,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        hidden_act=act, eos_token_id=49407, bos_token_id=49406, pad_token_id=0,
    )  # fmt: skip
    return randomized(CLIPTextModelWithProjection(config))


def upsampler(**more):
    return UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2, **{**UP, **more},
    )  # fmt: skip


def write_karlo(folder):
    """The folder of diffusers' pipeline."""
    torch.manual_seed(0)
    decoder = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, cross_attention_dim=40,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=16, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", **UP,
    )  # fmt: skip

    text = {"clip_embeddings_dim": DIM, "time_embed_dim": 128, "cross_attention_dim": 40}
    parts = {
        "prior": PriorTransformer(2, 16, 2, embedding_dim=DIM, num_embeddings=LENGTH),
        "decoder": decoder,
        "text_proj": UnCLIPTextProjModel(**text),
        "super_res_first": upsampler(),
        "super_res_last": upsampler(),
    }
    for name, module in parts.items():
        randomized(module).save_pretrained(folder / name)
    text_model().save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    source = write_karlo(folder / "karlo-v1-alpha")
    assert main(["import", "karlo", str(source), "--out", str(folder / "model")]) == 0
    return folder / "model"


def test_a_whole_cascade_paints(model, tmp_path):
    out = tmp_path / "out.png"
    words = ["--set", "decoder.steps=3", "--set", "prior.steps=3", "--out", str(out)]
    assert main(["sample", "--model", str(model), "a red circle", *words]) == 0
    assert Image.open(out).size == (32, 32)
    assert {path.name for path in model.iterdir()} == {
        *("prior", "decoder", "sr256", "clip", "cascade.yaml")
    }


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_text_tower_is_that_of_transformers(act, tmp_path):
    from cascade.interop.text_towers import text_tower

    theirs = text_model(act)
    theirs.save_pretrained(tmp_path / "text_encoder")
    text_tower(tmp_path / "text_encoder")(tmp_path / "clip")
    found = FrozenCLIP(str(tmp_path / "clip"), unit=False).text(CAPTIONS)
    with torch.no_grad():
        out = theirs(tokenize(CAPTIONS, LENGTH))
    n = found["text"].shape[1]
    assert relative(found["clip_text"], out.text_embeds) < 1e-5
    assert relative(found["text"], out.last_hidden_state[:, :n]) < 1e-5
    norms = found["clip_text"].norm(dim=1)
    unit = FrozenCLIP(str(tmp_path / "clip")).text(CAPTIONS)["clip_text"]
    assert relative(unit, found["clip_text"] / norms[:, None]) < 1e-5


def own_decoder(folder, clip, *more):
    """A decoder of one's own, untrained, that reads embeddings of a CLIP."""
    sizes = ["net.channels=8", "net.embed=16", "net.blocks=1", "net.width=16", "size=8"]
    sizes += ["net.head_channels=8", "net.multipliers=[1,2]", "net.attention=[1]"]
    sizes += [f"clip.path={clip}", "+clip.checkpoint=null", f"clip.model.dim={DIM}"]
    config = composed("train", ["stage=decoder", "data.path=none", f"run={folder}", *sizes, *more])
    folder.mkdir(parents=True)
    saved(config, folder / "config.yaml")
    torch.manual_seed(0)
    Run(folder).stage().export(folder)
    return folder


def mixed(model, folder, decoder):
    """The imported prior, then a decoder of one's own."""
    shutil.copytree(model / "prior", folder / "prior", dirs_exist_ok=True)
    text = {"stages": {"prior": {"steps": 2}, "decoder": {"run": str(decoder), "steps": 2}}}
    OmegaConf.save(text, folder / "cascade.yaml")
    return folder


RAW = ["+clip.unit=false", "+stage.conditioner.embedders.clip_image.unit=false"]


def test_an_imported_prior_beside_a_decoder_of_ones_own(model, tmp_path):
    decoder = own_decoder(tmp_path / "decoder", model / "clip", *RAW)
    cascade = load_cascade(mixed(model, tmp_path / "mixed", decoder))
    batch = {"caption": ["a red circle"], "sample": torch.tensor([0])}
    assert cascade(batch, seed=0)["image_8"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("other", "more", "says"),
    [
        (False, [], "prior writes raw embeddings, and decoder reads unit-norm ones"),
        (True, RAW, "prior writes embeddings of the CLIP .*, and decoder reads those of"),
        (False, [*RAW, "clip.model.dim=8"], "writes embeddings of 24 numbers, and decoder reads 8"),
    ],
)
def test_stages_of_two_clips_are_refused(other, more, says, model, tmp_path):
    clip = small_clip(tmp_path / "clip", DIM, DIM, LENGTH) if other else model / "clip"
    decoder = own_decoder(tmp_path / "decoder", clip, *more)
    with pytest.raises(UserError, match=says):
        load_cascade(mixed(model, tmp_path / "mixed", decoder))


def test_an_encoder_of_other_sizes_is_refused_before_sampling(model, tmp_path):
    """Even where no hash is recorded, as when the encoder was not there at the import."""
    clip = small_clip(tmp_path / "clip", 16, DIM, LENGTH)
    shutil.copytree(model, tmp_path / "model")
    for file in (tmp_path / "model").glob("*/config.yaml"):
        file.write_text(file.read_text().replace(str(model / "clip"), str(clip)))
    for file in (tmp_path / "model").glob("*/weights.safetensors"):
        save_file(load_file(file), file, {"encoders": "[]"})
    with pytest.raises(UserError, match=r"prior reads clip_text of 24 numbers, .*clip has 16"):
        load_cascade(tmp_path / "model")


def test_embeddings_must_be_normalised_as_a_stage_takes_them():
    rows = torch.randn(4, 8)
    unit = rows / rows.norm(dim=1, keepdim=True)
    check_rows(False, rows, "here")
    check_rows(True, unit, "here")
    with pytest.raises(UserError, match="holds raw embeddings, but a stage takes unit-norm ones"):
        check_rows(True, rows, "here")
    with pytest.raises(UserError, match="precompute --raw"):
        check_rows(False, unit, "here")


def test_the_manifest_and_the_hash_state_raw_embeddings(tmp_path):
    clip = small_clip(tmp_path / "clip", DIM, DIM, LENGTH)
    unit, raw = FrozenCLIP(str(clip)), FrozenCLIP(str(clip), unit=False)
    assert about_pictures(unit).unit_norm == ["clip_image"]
    assert about_pictures(raw).unit_norm == []
    assert unit.hash != raw.hash
    assert differs(raw, unit.hash)
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    assert relative(unit.image(picture), F.normalize(raw.image(picture), dim=1)) < 1e-6


def test_a_part_that_is_missing_leaves_nothing(model, tmp_path, capsys):
    source = write_karlo(tmp_path / "karlo-v1-alpha")
    (source / "super_res_last/config.json").unlink()
    assert main(["import", "karlo", str(source), "--out", str(tmp_path / "model")]) == 2
    assert "super_res_last holds no config.json" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"karlo-v1-alpha"}
