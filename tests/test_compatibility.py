"""What does not fit is refused in one line, with both numbers and the setting, before any data."""

import hashlib
import json

import pytest
import torch

from cascade.config.compose import built, composed
from cascade.data.embeddings import Manifest
from cascade.encoders.clip import Architecture, FrozenCLIP, save_clip
from cascade.encoders.identity import Former
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError
from cascade.training.compatibility import check

SIZES = {"text_width": 32, "text_layers": 1, "text_heads": 2, "length": 16}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two CLIPs of 8 dimensions that differ in their weights."""
    folders = [tmp_path_factory.mktemp(f"clip{i}") for i in range(2)]
    for folder in folders:
        architecture = Architecture(32, 8, 1, 32, patch=8, **SIZES)
        save_clip(architecture, architecture.build(), folder)
    return folders


def manifest(folder, clip, dim=8):
    Manifest(str(clip), FrozenCLIP(str(clip)).hash, {"clip_image": dim}, {}).write(folder)
    return folder


def checked(*overrides):
    config = composed("train", ["data.path=none", *map(str, overrides)])
    with torch.device("meta"):
        stage = built(config.stage)
    stores = built(config.data.get("embeddings") or {}).values()
    named = {key: config.clip.get(key) for key in ("checkpoint", "quick_gelu")}
    clip = FrozenCLIP(config.clip.path, **named)
    captions = config.data.get("captions") or ["txt"]
    crop, several = config.data.pictures.get("crop"), config.data.get("several")
    check(stage, stores, clip, crop, captions, several)


def refused(words, *overrides):
    with pytest.raises(UserError, match=words) as caught:
        checked(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["decoder_text", "decoder", "prior", "sr256"])
def test_what_is_not_here_is_not_judged(stage):
    checked(f"stage={stage}", "clip.path=nowhere")
    checked(f"stage={stage}", "clip.path=nowhere", "text=t5_xxl")


def test_a_text_size_that_differs_from_t5s(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 512}))
    reader = ("stage=decoder_text", "text=t5_small", f"text.reader.path_or_name={tmp_path}")
    checked(*reader)
    refused(
        r"text.size=768, but text of .* has 512 numbers: set text.size=512",
        *reader,
        "text.size=768",
    )


def test_a_text_size_that_differs_from_clips():
    vit = ("stage=decoder_text", "text=clip_vit_l_14")
    checked(*vit)
    refused(r"text.size=512, but text of ViT-L-14 has 768 numbers", *vit, "text.size=512")


def test_a_text_transformer_of_another_size():
    override = ("stage=decoder_text", "text.encoder.width=64")
    refused(r"text.size=96, .* 64 wide: set text.encoder.width=96", *override)


def test_a_clip_of_another_size(clips):
    prior = ("stage=prior", f"clip.path={clips[0]}", "text.size=32")
    checked(*prior, "clip.model.dim=8", "embeddings=nowhere")
    refused(r"clip.model.dim=64, but clip_text of .* has 8 numbers: set clip.model.dim=8", *prior)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_embeddings_of_another_size_or_another_clip(clips, stage, tmp_path):
    own, other = clips
    options = (f"stage={stage}", f"clip.path={own}", "clip.model.dim=8")
    if stage == "prior":
        options += ("text.size=32",)
    right = manifest(tmp_path / "right", own)
    checked(*options, f"embeddings={right}")
    wrong = manifest(tmp_path / "wrong", other)
    hashes = (FrozenCLIP(str(clip)).hash for clip in (other, own))
    words = r"made by another CLIP .*{}.*{}.*set clip.path.*set embeddings".format(*hashes)
    refused(words, *options, f"embeddings={wrong}")
    large = manifest(tmp_path / "large", own, dim=12)
    words = "clip.model.dim=8, but clip_image of .*large has 12 numbers: set clip.model.dim=12"
    refused(words, *options, f"embeddings={large}")


def test_embeddings_that_an_earlier_version_made(clips, tmp_path):
    """It noted a hash of the weights: enough for a directory, and not for a name and a file."""
    options = ("stage=prior", f"clip.path={clips[0]}", "clip.model.dim=8", "text.size=32")
    weights = (clips[0] / "open_clip_model.safetensors").read_bytes()
    noted = hashlib.sha256(weights).hexdigest()[:16]
    for name in (str(clips[0]), "ViT-B-32"):
        Manifest(name, noted, {"clip_image": 8}, {}).write(tmp_path / name.replace("/", "_"))
    checked(*options, f"embeddings={tmp_path / str(clips[0]).replace('/', '_')}")
    refused("recorded by a version that read", *options, f"embeddings={tmp_path / 'ViT-B-32'}")


def test_a_checkpoint_that_nothing_would_read(clips, tmp_path):
    right = manifest(tmp_path / "right", clips[0])
    options = ("stage=prior", "clip.model.dim=8", "text.size=32", f"embeddings={right}")
    ignored = (f"clip.path={clips[0]}", "+clip.checkpoint=missing.pt")
    refused("checkpoint=missing.pt would be ignored: .* is a directory", *options, *ignored)


def test_text_embeddings_of_another_clip_than_the_pictures(clips, tmp_path):
    """Even where clip.path is right: the prior would be told of another space."""
    right = manifest(tmp_path / "right", clips[0])
    options = ("stage=prior", f"clip.path={clips[0]}", "clip.model.dim=8", "text.size=32")
    reader = f"text.reader.path_or_name={clips[1]}"
    refused("another CLIP", *options, f"embeddings={right}", reader)


@pytest.fixture
def text_rows(tmp_path, monkeypatch):
    """Overrides of a stage that reads what a T5 of 16 numbers and 20 tokens made of `txt`."""
    monkeypatch.setattr(FrozenT5, "hash", "0" * 16)
    monkeypatch.setattr(FrozenT5, "former", Former("f" * 16))
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 16}))
    reader = ["text=t5_small", f"text.reader.path_or_name={tmp_path}", "+text.reader.length=20"]
    target = "cascade.data.embeddings.Embeddings"

    def options(name, **changes):
        about = {"encoder": "t5", "hash": "0" * 16, "sizes": {"text": 16}, "dtypes": {}}
        Manifest(**{**about, "captions": ["txt"], "length": 20, **changes}).write(tmp_path / name)
        store = f"{{_target_: {target}, folder: {tmp_path / name}}}"
        return ["stage=decoder_text", "text.size=16", *reader, f"+data.embeddings.{name}={store}"]

    return options


def test_states_of_another_encoder_length_or_captions(text_rows):
    checked(*text_rows("right"))
    checked(*text_rows("old", hash="f" * 16))  # of an earlier version, of the weights alone
    refused("made by another encoder .t5, 1{16}. .*set text to", *text_rows("a", hash="1" * 16))
    refused("text.reader.length=20, .* --length 77: set .*=77", *text_rows("b", length=77))
    refused("text.size=16, but text of .*c has 32", *text_rows("c", sizes={"text": 32}))
    captions = "+data.captions={txt: 0.5, long_caption: 0.5}"
    refused(
        r"captions of txt, but data.captions are txt,long_caption: run .* --captions txt,long_c",
        *text_rows("d"),
        captions,
    )
    checked(*text_rows("e", captions=["long_caption", "txt"]), captions)
    refused("drawn, but .*h has one row for each", *text_rows("h"), "+data.several=drawn")
    refused(
        "i was made with no --several, but data.several is first: run .* with --several first",
        *text_rows("i"),
        "+data.several=first",
    )
    refused("made with --several all, but .* is not set", *text_rows("j", several="all"))
    checked(*text_rows("k", several="all"), "+data.several=all")


def test_two_folders_with_the_same_rows(text_rows):
    refused("text is in .*f and in .*g: keep one", *text_rows("f"), text_rows("g")[-1])


def test_pictures_that_the_network_cannot_halve():
    refused(r"sides of 18 px are not multiples of 4", "stage=sr256", "net.net.patch=2", "crop=18")
    refused(r"sides of 17 px are not multiples of 2", "stage=decoder_text", "size=17")


def test_a_condition_of_another_size_than_the_network_reads():
    caption = "stage.conditioner.embedders.caption"
    refused(r"net.embed=128, .* caption gives 64", "stage=decoder_text", f"{caption}.dim=64")
    refused(r"net.width=96, .* caption gives 64", "stage=decoder_text", f"{caption}.width=64")
    refused(
        r"net.embed=128, .* low gives 64", "stage=sr256", "stage.conditioner.embedders.low.dim=64"
    )
    refused(r"image_channels=0, .* have 3", "stage=sr256", "net.net.image_channels=0")
