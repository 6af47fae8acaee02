"""CLIPs as others publish them give the embeddings that the others' own code gives."""

import pickle
import zipfile

import open_clip
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from cascade.encoders import sources
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.published.archive import is_archive, read_archive
from cascade.encoders.published.names import alias
from cascade.encoders.sources import clip_source
from cascade.encoders.text import tokenize
from cascade.errors import UserError
from cascade.export.encoders import write_encoder

CAPTIONS = ["a red square", "two small blue circles above a star", "!"]
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
TOWERS = {
    "vit": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
}
NEAR = {"rtol": 0, "atol": 1e-5}


def pictures():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def shifted(x, mean=MEAN, std=STD):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return ((x + 1) / 2 - mean) / std


def spread(module):
    """Weights of a size at which the activation matters."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "logit" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def transformers_clip(folder, act="quick_gelu", pickled=False, **more):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    text = {**sizes, "intermediate_size": 96, "max_position_embeddings": 16, "eos_token_id": 49407}
    vision = {**sizes, "intermediate_size": 256, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**text, **more}, vision_config=vision, projection_dim=24)
    model = spread(CLIPModel(config))
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    text = f'{{"image_mean": {list(MEAN)}, "image_std": {list(STD)}}}'
    (folder / "preprocessor_config.json").write_text(text)
    return model


@pytest.mark.parametrize(("act", "pickled"), [("quick_gelu", False), ("gelu", True)])
@torch.no_grad()
def test_a_folder_of_transformers(act, pickled, tmp_path):
    theirs, ours = transformers_clip(tmp_path, act, pickled), FrozenCLIP(str(tmp_path))
    ids = tokenize(CAPTIONS, 16)
    text = theirs.text_model(input_ids=ids)
    found = ours.text(CAPTIONS)
    own = F.normalize(theirs.text_projection(text.pooler_output), dim=1)
    torch.testing.assert_close(found["clip_text"], own, **NEAR)
    states = text.last_hidden_state[:, : found["text"].shape[1]]
    torch.testing.assert_close(found["text"], states, **NEAR)
    image = theirs.vision_model(pixel_values=shifted(pictures())).pooler_output
    own = F.normalize(theirs.visual_projection(image), dim=1)
    torch.testing.assert_close(ours.image(pictures()), own, **NEAR)
    assert ours.sizes == {"clip_text": 24, "text": 64}
    assert ours.choices["quick_gelu"] == (act == "quick_gelu")


def openai_clip(kind="vit", quick=True, half=False, dim=24):
    model = open_clip.CLIP(dim, TOWERS[kind], TEXT, quick_gelu=quick)
    spread(model)
    if half:
        model.half().float()  # rounded
    del model.context_length, model.vocab_size
    for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        model.register_buffer(name, torch.tensor(value))
    return model


@pytest.mark.parametrize(("kind", "quick"), [("vit", True), ("resnet", False)])
@torch.no_grad()
def test_an_archive_of_openai(kind, quick, tmp_path):
    theirs, file = openai_clip(kind, quick), tmp_path / "ViT.pt"
    torch.jit.save(torch.jit.script(theirs), file)
    ours = FrozenCLIP(str(file))
    assert ours.choices["quick_gelu"] is quick
    tokens = tokenize(CAPTIONS, 16)
    own = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours.text(CAPTIONS)["clip_text"], own, **NEAR)
    openai = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    own = theirs.encode_image(shifted(pictures(), *openai), normalize=True)
    torch.testing.assert_close(ours.image(pictures()), own, **NEAR)
    assert (ours.dim, ours.length, ours.image_size) == (24, 16, 32)


def test_an_archive_in_half_precision_is_read_to_the_bit(tmp_path):
    model = openai_clip().half()
    torch.jit.save(torch.jit.script(model), tmp_path / "half.pt")
    found = read_archive(tmp_path / "half.pt").tensors
    assert found.keys() == {"attn_mask", *model.state_dict()}
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_a_plain_state_dict_shows_too_little_unless_it_was_published(tmp_path, monkeypatch):
    theirs, file = openai_clip(), tmp_path / "plain.pt"
    torch.save(theirs.state_dict(), file)
    with pytest.raises(UserError, match="neither its activation nor how its pictures"):
        FrozenCLIP(str(file), quick_gelu=True).text(CAPTIONS)
    monkeypatch.setattr(sources, "_published", lambda _: True)
    own = theirs.encode_text(tokenize(CAPTIONS, 16), normalize=True)
    torch.testing.assert_close(FrozenCLIP(str(file)).text(CAPTIONS)["clip_text"], own, **NEAR)
    with pytest.raises(UserError, match="says QuickGELU, but quick_gelu says GELU"):
        clip_source(str(file), quick_gelu=False)


def test_an_archive_with_a_name_must_not_contradict_what_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "list_models", lambda: ["small"])
    config = {"embed_dim": 24, "vision_cfg": TOWERS["vit"], "text_cfg": TEXT}
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: dict(config))
    torch.jit.save(torch.jit.script(openai_clip()), tmp_path / "a.pt")
    assert clip_source("small", str(tmp_path / "a.pt")).choices["quick_gelu"]
    with pytest.raises(UserError, match="its archive says QuickGELU"):
        clip_source("small", str(tmp_path / "a.pt"), quick_gelu=False)


def test_names_of_others():
    assert alias("ViT-L/14") == ("ViT-L-14", None)
    assert alias("ViT-L/14@336px") == ("ViT-L-14-336", None)
    for name in ("timm/vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_224.openai"):
        assert alias(name) == ("ViT-L-14", "openai")
    assert alias("ViT-H-14") == ("ViT-H-14", None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hidden_act": "relu"}, "another hidden_act"),
        ({"vocab_size": 1000}, "has not CLIP's 49408 tokens"),
        ({"layer_norm_eps": 1e-6}, "another layer_norm_eps"),
    ],
)
def test_what_is_no_clip_of_open_clips_is_refused(more, message, tmp_path):
    transformers_clip(tmp_path, **more)
    with pytest.raises(UserError, match=message):
        FrozenCLIP(str(tmp_path)).text(CAPTIONS)


def test_without_its_normalisation_a_folder_is_not_read(tmp_path):
    transformers_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="how its pictures are normalised"):
        FrozenCLIP(str(tmp_path)).text(CAPTIONS)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_an_archive_runs_nothing(tmp_path, canary):
    file = tmp_path / "evil.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(Evil(canary), protocol=2))
        archive.writestr("evil/data.pkl", pickle.dumps({"x": Evil(canary)}, protocol=2))
        archive.writestr("evil/code/__torch__.py", f"open({str(canary)!r}, 'w')")
    assert is_archive(file)
    with pytest.raises(UserError, match="no CLIP in OpenAI's layout"):
        FrozenCLIP(str(file)).text(CAPTIONS)


def test_a_damaged_archive_is_one_line(tmp_path):
    torch.jit.save(torch.jit.script(openai_clip()), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    place = next(name for name in parts if name.endswith("/data.pkl"))
    for data in (parts[place][:-200], b"\x80\x02N.", parts[place].replace(b"Float", b"Fleet", 1)):
        with zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
            for name, value in {**parts, place: data}.items():
                cut.writestr(name, value)
        with pytest.raises(UserError) as error:
            FrozenCLIP(str(tmp_path / "cut.pt")).text(CAPTIONS)
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_each_format_leaves_as_one_folder_of_safetensors(tmp_path):
    transformers_clip(tmp_path / "a")
    torch.jit.save(torch.jit.script(openai_clip()), tmp_path / "b.pt")
    for name in ("a", "b.pt"):
        theirs = FrozenCLIP(str(tmp_path / name))
        write_encoder(theirs, tmp_path / f"out {name}")
        ours = FrozenCLIP(str(tmp_path / f"out {name}"))
        one, other = (clip.text(CAPTIONS)["clip_text"] for clip in (ours, theirs))
        torch.testing.assert_close(one, other, **NEAR)
        assert torch.equal(ours.image(pictures()), theirs.image(pictures()))
        assert ours.choices == theirs.choices
