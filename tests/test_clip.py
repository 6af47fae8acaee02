import hashlib
import json
import math
import pickle
import socket
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import lightning as L
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cascade.encoders.clip import (
    MAX_LOGIT_SCALE,
    Architecture,
    CLIPTraining,
    FrozenCLIP,
    contrastive,
    save_clip,
)
from cascade.encoders.sources import clip_source
from cascade.errors import UserError

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
    assert (frozen.dim, frozen.width, frozen.length, frozen.image_size) == (8, 32, 16, 32)


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
    assert frozen.hash == hashlib.sha256(weights).hexdigest()[:16]


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
    frozen = FrozenCLIP(named, str(tmp_path / "clip.pt"))
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
        ((named, str(tmp_path / "evil.pt")), "safely"),
        ((named, str(tmp_path / "other.pt")), "RuntimeError"),
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
        ).fit(module, DataLoader(batches, batch_size=None))
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
    with pytest.raises(UserError, match="another size"):
        training(RESNET).restore(tmp_path)
    with pytest.raises(UserError, match="train it first"):
        other.restore(tmp_path / "nowhere")


def test_the_scale_stays_below_a_hundred():
    module = training()
    module.clip.logit_scale.data.fill_(9.0)
    module.optimizer_step(0, 0, SimpleNamespace(step=lambda closure: None))
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
