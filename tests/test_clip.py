import hashlib
import json
import math
import pickle
import shutil
import socket
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import lightning as L
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from cascade.encoders import sources
from cascade.encoders.clip import (
    MAX_LOGIT_SCALE,
    Architecture,
    CLIPTraining,
    FrozenCLIP,
    contrastive,
    save_clip,
)
from cascade.encoders.identity import differs
from cascade.encoders.sources import clip_source
from cascade.errors import UserError
from cascade.training.module import Training

TEXT = {"text_width": 32, "text_layers": 2, "text_heads": 2, "length": 16}
RESNET = Architecture(32, 8, vision_layers=[1, 1, 1, 1], vision_width=8, **TEXT)
VIT = Architecture(32, 8, vision_layers=2, vision_width=32, patch=8, **TEXT)
CAPTIONS = ["a red square", "", "two small blue circles " * 20, "Überraschung! 42"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A residual network and a vision transformer, saved."""
    folders = {"resnet": RESNET, "vit": VIT}
    for name, architecture in folders.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        clip = architecture.build()
        with torch.no_grad():  # statistics and a scale that an untrained model does not have
            clip.logit_scale.fill_(3.0)
            clip.train().encode_image(torch.randn(64, 3, 32, 32))
        save_clip(architecture, clip, folders[name])
    return folders


@pytest.fixture
def vit(folders):
    return FrozenCLIP(str(folders["vit"]))


def pictures(n, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_open_clip_reads_the_directory_and_computes_the_same(folders, kind):
    frozen = FrozenCLIP(str(folders[kind]))
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders[kind]}")
    theirs.eval()
    assert preprocess.transforms[-1].mean == [0.5, 0.5, 0.5]

    x, found = pictures(4), frozen.text(CAPTIONS)
    tokens = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")(CAPTIONS)
    assert torch.equal(found["tokens"], tokens)
    torch.testing.assert_close(frozen.image(x), F.normalize(theirs.encode_image(x), dim=1))
    torch.testing.assert_close(found["clip_text"], F.normalize(theirs.encode_text(tokens), dim=1))

    end = found["text_mask"].sum(1) - 1
    pooled = found["text"][torch.arange(4), end] @ theirs.text_projection
    torch.testing.assert_close(found["clip_text"], F.normalize(pooled, dim=1))
    assert (frozen.dim, frozen.length, frozen.image_size) == (8, 16, 32)


def test_pictures_of_any_size_are_resized(vit):
    flat = torch.tensor([0.3, -0.7, 1.0])[:, None, None]
    torch.testing.assert_close(
        vit.image(flat.expand(1, 3, 80, 80)), vit.image(flat.expand(1, 3, 32, 32))
    )


def test_states_are_causal(vit):
    a, b = vit.text(["a red square", "a red circle on grey"])["text"]
    torch.testing.assert_close(a[:3], b[:3])
    assert not torch.allclose(a[3], b[3])


def test_a_batch_gets_the_keys_that_are_promised(vit):
    batch = vit({"caption": CAPTIONS, "sample": torch.arange(4)})
    assert batch.keys() == {"caption", "sample"} | vit.writes
    torch.testing.assert_close(batch["clip_text"].norm(dim=1), torch.ones(4))


def test_a_module_that_holds_one_does_not_own_it(vit):
    module = L.LightningModule()
    module.clip = vit
    vit.text(["loaded now"])
    assert not module.state_dict()
    assert not list(module.parameters())
    assert not vit.text(["x"])["text"].requires_grad


def test_nothing_is_read_before_first_use(tmp_path):
    frozen = FrozenCLIP(str(tmp_path / "later"))
    save_clip(VIT, VIT.build(), tmp_path / "later")
    assert frozen.dim == 8
    weights = (tmp_path / "later" / "open_clip_model.safetensors").read_bytes()
    assert frozen.former.hash == hashlib.sha256(weights).hexdigest()[:16] != frozen.hash


@pytest.fixture
def named(tmp_path):
    """A small architecture that open_clip knows by name."""
    path = tmp_path / "cascade-test-vit.json"
    path.write_text(json.dumps(VIT.model_config()))
    open_clip.add_model_config(path)
    yield path.stem
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS[path.stem]


def test_a_name_with_a_file_of_weights(named, tmp_path):
    clip = VIT.build().eval()
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    frozen = FrozenCLIP(named, str(tmp_path / "clip.pt"), quick_gelu=False)
    x = pictures(2)
    mean, std = (
        torch.tensor(open_clip.OPENAI_DATASET_MEAN),
        torch.tensor(open_clip.OPENAI_DATASET_STD),
    )
    normalised = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(
        frozen.image(x), clip.encode_image(normalised, normalize=True).detach()
    )


def test_a_tag_is_looked_up_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"fetch .* of timm/vit_base_patch32_clip_224.openai"):
        clip_source("ViT-B-32", "openai")
    repository = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    weights = repository / "snapshots" / "abc" / "open_clip_model.safetensors"
    for path, text in ((repository / "refs" / "main", "abc"), (weights, "")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = clip_source("ViT-B-32", "openai")
    assert found.weights == weights
    assert found.model["quick_gelu"]
    assert found.mean == open_clip.OPENAI_DATASET_MEAN
    laion = {"hf_hub": "timm/vit_base_patch32_clip_224.openai/", "mean": (0.5,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: laion)
    assert clip_source("ViT-B-32", "another").mean == (0.5, 0.5, 0.5)


class QuickGELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def with_quick_gelu(clip):
    """The same model with the other activation, put in by hand."""
    for module in list(clip.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GELU):
                setattr(module, name, QuickGELU())
    return clip.eval()


def configured(folder, **changes):
    """A copy of a directory's configuration with other arguments of the model."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_cfg": {**config["model_cfg"], **changes}}))


@pytest.fixture
def unnamed(named, tmp_path):
    """A file of weights that says nothing of itself, its name, and the model that it is of."""
    clip = VIT.build().eval()
    with torch.no_grad():
        clip.logit_scale.fill_(3.0)
    file = tmp_path / "CLIP.pt"
    torch.save(clip.state_dict(), file)
    return named, file, clip


def embedding(clip, captions=CAPTIONS):
    tokens = open_clip.tokenize(captions, VIT.length)
    return F.normalize(clip.encode_text(tokens), dim=1).detach()


def test_a_file_is_read_with_the_activation_that_is_given(unnamed):
    name, file, clip = unnamed
    with pytest.raises(UserError, match="does not show its activation: give quick_gelu=true"):
        FrozenCLIP(name, str(file)).text(CAPTIONS)
    plain = FrozenCLIP(name, str(file), quick_gelu=False)
    torch.testing.assert_close(plain.text(CAPTIONS)["clip_text"], embedding(clip))
    quick = FrozenCLIP(name, str(file), quick_gelu=True)
    found = quick.text(CAPTIONS)["clip_text"]
    torch.testing.assert_close(found, embedding(with_quick_gelu(clip)))
    assert not torch.allclose(found, plain.text(CAPTIONS)["clip_text"], atol=1e-4)
    assert quick.hash != plain.hash
    assert quick.former.hash == plain.former.hash


def test_what_else_says_the_activation(unnamed, monkeypatch, tmp_path):
    name, file, clip = unnamed
    expected = embedding(with_quick_gelu(clip))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for known in (digest, digest[:8]):  # OpenAI's addresses hold all of it, others the beginning
        monkeypatch.setattr(sources, "_digests", lambda known=known: {known: True})
        torch.testing.assert_close(
            FrozenCLIP(name, str(file)).text(CAPTIONS)["clip_text"], expected
        )
    with pytest.raises(UserError, match="quick_gelu says GELU, but its SHA-256"):
        FrozenCLIP(name, str(file), quick_gelu=False).text(["a"])
    monkeypatch.undo()

    folder = tmp_path / "folder"
    save_clip(VIT, clip, folder)
    configured(folder, quick_gelu=True)
    directory = FrozenCLIP(str(folder))
    torch.testing.assert_close(directory.text(CAPTIONS)["clip_text"], expected)
    beside = FrozenCLIP(name, str(folder / "open_clip_model.safetensors"))  # of that folder
    assert beside.hash == directory.hash
    torch.testing.assert_close(beside.image(pictures(2)), directory.image(pictures(2)))
    for frozen in (FrozenCLIP(str(folder), quick_gelu=False), FrozenCLIP(str(folder), str(file))):
        with pytest.raises(UserError, match=r"says QuickGELU, but|would be ignored: .* directory"):
            frozen.text(["a"])
    with pytest.raises(UserError, match="would be ignored"):  # though there is no such file
        FrozenCLIP(str(folder), "missing.pt").text(["a"])


def test_published_files_are_known_by_their_sha256():
    """OpenAI's ViT-L/14 (as its own repository lists it), LAION's ViT-B/32 in open_clip's."""
    known = sources._digests()
    assert known["b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"] is True
    assert known["af8dbd0c"] is False


def test_the_name_may_say_the_activation(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    assert clip_source("ViT-L-14-quickgelu", str(tmp_path / "x.pt")).model["quick_gelu"] is True
    with pytest.raises(UserError, match=r"true .* openai, metaclip.* false .* laion400m"):
        clip_source("ViT-L-14", str(tmp_path / "x.pt"))


def test_the_hash_is_of_weights_and_architecture(folders, tmp_path):
    shutil.copytree(folders["vit"], tmp_path / "clip")
    folder, before = tmp_path / "clip", FrozenCLIP(str(folders["vit"])).hash
    text = VIT.model_config()["text_cfg"]
    configured(folder, quick_gelu=False, text_cfg={**text, "pad_id": 0, "vocab_size": 49408})
    assert FrozenCLIP(str(folder)).hash == before  # defaults that are written out
    configured(folder, text_cfg={**text, "heads": 4})
    heads = FrozenCLIP(str(folder)).hash
    configured(folder, text_cfg=text, quick_gelu=True)
    assert len({before, heads, FrozenCLIP(str(folder)).hash}) == 3


def test_what_an_earlier_version_noted_counts_where_it_meant_this_clip(unnamed, tmp_path):
    name, file, clip = unnamed
    save_clip(VIT, clip, tmp_path / "own")
    own = FrozenCLIP(str(tmp_path / "own"))
    old = own.former.hash
    assert differs(own, own.hash) is differs(own, old) is differs(own, old, "elsewhere/own") is None
    assert "its hash is" in differs(own, "0" * 16)
    # Its pictures are not normalised as those of a name were.
    assert "recorded by a version" in differs(own, old, name)
    plain, quick = (FrozenCLIP(name, str(file), quick_gelu=q) for q in (False, True))
    assert differs(plain, plain.former.hash) is differs(plain, plain.former.hash, name) is None
    assert "recorded by a version" in differs(quick, quick.former.hash)
    assert "recorded by a version" in differs(quick, quick.former.hash, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 48}, r"visual.positional_embedding is \[37, 32\], not \[17, 32\]"),
        ({"length": 24}, r"positional_embedding is \[24, 32\], not \[16, 32\]"),
        ({"vision_layers": 3}, r"has besides visual.transformer.resblocks.2.* 11 more tensors"),
        ({"vision_layers": 1}, r"lacks visual.transformer.resblocks.1.* \(and 11 more tensors\)"),
    ],
)
def test_a_clip_of_another_size_is_not_bent_to_fit(change, words, tmp_path):
    save_clip(VIT, replace(VIT, **change).build(), tmp_path)
    with pytest.raises(UserError, match=words):
        FrozenCLIP(str(tmp_path)).image(pictures(1))
    if "length" in change:
        with pytest.raises(UserError, match=words):
            FrozenCLIP(str(tmp_path)).text(["a"])
    with pytest.raises(UserError, match=words):
        training().restore(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_less_precision_are_converted(folders, dtype, tmp_path):
    shutil.copytree(folders["resnet"], tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    whole = FrozenCLIP(str(tmp_path / "clip")).text(CAPTIONS)["clip_text"]
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    found = FrozenCLIP(str(tmp_path / "clip")).text(CAPTIONS)["clip_text"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, atol=0.02, rtol=0)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code from a file of weights was run",)


def test_what_is_wrong_is_said_in_one_line(named, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(RESNET.build().state_dict(), tmp_path / "other.pt")
    for arguments, words in (
        ((str(tmp_path / "nowhere"),), "open_clip_model.safetensors"),
        ((str(tmp_path / "empty"),), "put its open_clip_config.json"),
        (("ViT-B-32",), "checkpoint=None"),
        (("ViT-B-32", str(tmp_path / "nothing.pt")), "laion2b_s34b_b79k"),
        (("ViT-B-16-SigLIP", "webli"), "another CLIP|local Hugging Face cache"),
        ((named, str(tmp_path / "evil.pt"), False), "pickle that cannot be read safely"),
        (
            (named, str(tmp_path / "other.pt"), False),
            "lacks visual.class_emb.* has besides vis",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            FrozenCLIP(*arguments).text(["a"])
        assert "\n" not in str(caught.value)


def test_equal_captions_are_not_negatives():
    a = F.normalize(torch.randn(3, 4), dim=1)
    b = F.normalize(torch.randn(3, 4), dim=1)
    scale = torch.tensor(5.0)
    s = (scale * a @ b.T).tolist()
    loss = contrastive(a, b, torch.arange(3), torch.tensor([7, 7, 1]), scale)
    expected = [
        math.log1p(math.exp(s[0][2] - s[0][0])),
        math.log1p(math.exp(s[1][2] - s[1][1])),
        math.log(sum(math.exp(s[2][j] - s[2][2]) for j in range(3))),
    ]
    torch.testing.assert_close(loss, torch.tensor(expected))


def training(architecture=VIT, **choices):
    torch.manual_seed(0)
    return CLIPTraining(architecture, partial(torch.optim.AdamW, lr=1e-3), **choices)


def some_batch(n=8):
    captions = [f"caption number {i % 6}" for i in range(n)]  # two of them twice
    return {"image_32": pictures(n), "caption": captions}


def test_two_ranks_train_as_one():
    batch = some_batch()
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    trained = []
    for world, batches in ((1, [batch]), (2, halves)):
        torch.manual_seed(0)
        module = CLIPTraining(VIT, partial(torch.optim.SGD, lr=0.1))
        L.Trainer(
            accelerator="cpu",
            devices=world,
            strategy="auto" if world == 1 else "ddp_fork",
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Training(module), DataLoader(batches, batch_size=None))
        trained.append(module.state_dict())
    start = training().state_dict()
    assert not torch.equal(start["clip.text_projection"], trained[0]["clip.text_projection"])
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=2e-6, rtol=1e-4, msg=name)


def test_training_learns_the_pairs_and_exports_them(tmp_path):
    module, batch = training(), some_batch()
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(40):
        losses.append(module.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 < 1.0 < losses[0]
    module.eval()
    module.export(tmp_path)
    image, text, _ = module.embed(batch)
    nearest = [batch["caption"][i] for i in (image @ text.T).argmax(1)]
    assert nearest == batch["caption"]
    frozen = FrozenCLIP(str(tmp_path))
    torch.testing.assert_close(frozen.image(batch["image_32"]), image.detach())
    torch.testing.assert_close(frozen.text(batch["caption"])["clip_text"], text.detach())

    other = training()
    other.restore(tmp_path)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in other.state_dict().items())
    with pytest.raises(UserError, match=r"visual\.conv1\.weight is"):
        training(RESNET).restore(tmp_path)
    with pytest.raises(UserError, match="train it first"):
        other.restore(tmp_path / "nowhere")


def test_the_scale_stays_below_a_hundred():
    module = training()
    module.clip.logit_scale.data.fill_(9.0)
    Training(module).optimizer_step(0, 0, SimpleNamespace(step=lambda closure: None))
    assert module.clip.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_decay_spares_vectors_and_the_schedule_counts_images():
    module = training(learning_rate=lambda images: 1 / (1 + images), batch=10)
    (optimizer,), (schedule,) = module.configure_optimizers()
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert (
        optimizer.param_groups[1]["weight_decay"] == 0 < optimizer.param_groups[0]["weight_decay"]
    )
    assert {id(module.clip.logit_scale), id(module.clip.ln_final.weight)} <= spared
    assert id(module.clip.token_embedding.weight) not in spared
    optimizer.step()
    schedule["scheduler"].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 11)


@pytest.mark.parametrize("architecture", [RESNET, VIT])
def test_it_builds_on_meta(architecture):
    with torch.device("meta"):
        module = training(architecture)
    assert all(p.is_meta for p in module.parameters())
