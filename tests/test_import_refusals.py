"""What cannot be imported is refused in one line, with exit code 2, and leaves nothing behind."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from cascade.cli import main
from tests import test_import_glide as of_glide
from tests import test_import_guided as of_guided
from tests.foreign import adm_names, randomized
from tests.test_fine_tuning import prior_at
from tests.test_import_cascades import UP, upsampler, write_karlo
from tests.test_import_deepfloyd import of_diffusers
from tests.test_import_karlo import DECODER, SR, decoder_of, original_decoder, original_sr
from tests.test_import_priors import published

PRIOR = "prior-ckpt-step=01000000-of-01000000.ckpt"
DIFFUSERS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files of each system."""
    root = tmp_path_factory.mktemp("files")
    write_karlo(root / "pipeline")
    prior_at().save_pretrained(root / "sharded", max_shard_size="20KB")
    published(prior_at(), root / "karlo")
    original_decoder(*decoder_of(24, 16), root / "karlo")
    original_sr([upsampler(), upsampler()], root / "karlo")
    state = adm_names(of_glide.unet(3, 8).state_dict(), [1, 1], [False, True], [None, 4])
    text = randomized(of_glide.Text(len(of_glide.vocabulary(root / "glide")))).names()
    torch.save(state | text, root / "glide/base.pt")
    of_guided.written(of_guided.network(3, sample_size=8), root / "64x64_diffusion.pt", 4, False)
    of_diffusers(False).save_pretrained(root / "if/unet")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=8, **UP,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(root / "stable")  # fmt: skip
    return root


def cut(path, bytes=100):
    path.write_bytes(path.read_bytes()[:-bytes])


def with_code(path):
    torch.save({**torch.load(path, weights_only=True), "code": print}, path)


def resized(path, name):
    """Another tensor of the same name, one row longer."""
    state = load_file(path)
    state[name] = torch.cat([state[name], state[name][:1]])
    save_file(state, path)


def other_class(path, name):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": name}))


def decoder_as_prior(root):
    shutil.move(root / DECODER, root / PRIOR)


def statistics_of(n):
    return lambda root: torch.save((torch.zeros(n), torch.ones(n)), root / "ViT-L-14_stats.th")


def prior_of_another_clip(root):
    shutil.rmtree(root / "prior")
    prior_at(dim=16).save_pretrained(root / "prior")


def other_upsampler(root):
    shutil.rmtree(root / "super_res_last")
    upsampler(layers_per_block=2).save_pretrained(root / "super_res_last")


def shard(root, number):
    return sorted(root.glob("*-of-*.safetensors"))[number]


CASES = {
    # A file of another system, or another part.
    "a decoder as a prior": ("karlo-prior", "karlo", decoder_as_prior, "lacks positional_embed"),
    "a prior as a decoder": ("karlo-decoder", f"karlo/{PRIOR}", None, "lacks input_blocks.0.0"),
    "a decoder as an upsampler": ("karlo-sr", f"karlo/{DECODER}", None, "model_first_steps"),
    "Karlo's as GLIDE's": ("glide", f"karlo/{DECODER}", None, "lacks"),
    "GLIDE's as Karlo's": ("karlo-decoder", "glide/base.pt", None, "lacks clip_emb.weight"),
    "GLIDE's base as its upsampler": ("glide-upsampler", "glide/base.pt", None, "reads 3 channels"),
    "GLIDE's as ADM's": ("guided-diffusion", "glide/base.pt", None, "has no label_emb.weight"),
    "ADM's as GLIDE's": ("glide", "64x64_diffusion.pt", None, "lacks token_embedding.weight"),
    "stage I as II": ("if-2", "if/unet", None, "is not of DeepFloyd IF, stage II"),
    "a decoder as IF's": ("if-1", "pipeline/decoder", None, "is not of DeepFloyd IF, stage I"),
    "a U-Net as a prior": ("kandinsky-prior", "pipeline/decoder", None, "PriorTransformer"),
    "half of Karlo": ("karlo", "glide", None, "holds no weights of Karlo's prior"),
    "no folder": ("if", "glide", None, "holds 0 folders IF-I-"),
    # Damaged files.
    "a cut checkpoint": ("karlo-sr", "karlo", lambda x: cut(x / SR), "cut short or damaged"),
    "a cut file": ("diffusers", "if/unet", lambda x: cut(x / DIFFUSERS), "cut short (3,0"),
    "a cut configuration": (
        "diffusers", "if/unet", lambda x: cut(x / "config.json"), "config.json",
    ),
    "cut statistics": (
        "karlo-prior", "karlo", lambda x: cut(x / "ViT-L-14_stats.th"), "cut short or damaged",
    ),
    "half a shard": ("karlo-prior", "sharded", lambda x: cut(shard(x, 1)), "cut short (17,0"),
    "no shard": ("karlo-prior", "sharded", lambda x: shard(x, 0).unlink(), "which is not there"),
    "a shard twice": (
        "karlo-prior", "sharded", lambda x: shutil.copy(shard(x, 0), shard(x, 1)), "has besides",
    ),
    # Pickles with code.
    "code of Karlo": ("karlo-sr", "karlo", lambda x: with_code(x / SR), "would run builtins.print"),
    "code of GLIDE": ("glide", "glide/base.pt", with_code, "would run builtins.print"),
    "code of ADM": ("guided-diffusion", "64x64_diffusion.pt", with_code, "run builtins.print"),
    # Files that do not belong together.
    "statistics of another CLIP": ("karlo-prior", "karlo", statistics_of(7), "is for 7 numbers"),
    "a projection of another decoder": (
        "karlo-decoder", "pipeline", lambda x: resized(
            x / "text_proj" / DIFFUSERS, "encoder_hidden_states_proj.bias"), "does not hold",
    ),
    "upsamplers of two sizes": ("karlo-sr", "pipeline", other_upsampler, "differ in size"),
    "a prior of another CLIP": (
        "karlo", "pipeline", prior_of_another_clip, "prior reads clip_text of 16 numbers",
    ),
    "the configuration of another class": (
        "diffusers", "pipeline/prior",
        lambda x: other_class(x / "config.json", "UNet2DModel"), "config.json",
    ),
    # Architectures without a counterpart.
    "Stable Diffusion": ("diffusers", "stable", None, "has blocks CrossAttnDownBlock2D"),
    "an autoencoder": (
        "diffusers", "pipeline/prior",
        lambda x: other_class(x / "config.json", "AutoencoderKL"), "AutoencoderKL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name, files, tmp_path, capsys):
    kind, place, damage, says = CASES[name]
    source = tmp_path / "source" / place
    if (files / place).is_dir():
        shutil.copytree(files / place, source)
    else:
        source.parent.mkdir(parents=True)
        shutil.copy(files / place, source)
    if damage:
        damage(source)
    assert main(["import", kind, str(source), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().split("\n")) == 1
    assert str(tmp_path) in error
    assert ".part" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_is_not_overwritten(files, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    source = str(files / "karlo")
    for kind in ("karlo-sr", "karlo"):
        assert main(["import", kind, source, "--out", str(tmp_path / "out")]) == 2
        assert "exists: choose another --out" in capsys.readouterr().err
    assert main(["import", "stable-diffusion", source, "--out", str(tmp_path / "new")]) == 2
    assert "is no kind of weights that can be imported" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
