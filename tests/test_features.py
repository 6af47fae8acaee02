"""Claims about feature spaces: what they look at, whose weights they take, what they are called."""

import hashlib
import json

import pytest
import torch
from torch.nn import functional as F

from cascade.errors import UserError
from cascade.eval.metrics import features as feature_spaces
from cascade.eval.metrics.dinov2 import DINOv2Features
from cascade.eval.metrics.features import (
    TENSORFLOW,
    CLIPFeatures,
    Features,
    InceptionFeatures,
    distance_name,
    eight_bit,
    inception,
)


class TinyCLIP:
    name, hash, dim = "tiny-b", "0123456789abcdef", 12

    def image(self, pictures):
        return pictures.flatten(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A seeded network in the file format of the real one, and the hash of that file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(inception().state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def dinov2(tmp_path):
    """A small one in the format of transformers, for pictures of 70 px."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_only_the_inception_of_the_fid_is_called_fid(weights, monkeypatch):
    clip = CLIPFeatures(TinyCLIP())
    assert distance_name(clip) == "Fréchet distance (CLIP features of tiny-b, 01234567)"
    path, sha256 = weights
    space = InceptionFeatures(path, sha256)
    assert distance_name(space).startswith("Fréchet distance (Inception-v3")
    monkeypatch.setattr(feature_spaces, "FID_SHA256", sha256)
    assert distance_name(space) == "FID"


def test_every_space_says_what_it_is(weights, dinov2):
    spaces = [
        CLIPFeatures(TinyCLIP()),
        InceptionFeatures(*weights),
        InceptionFeatures(*weights, TENSORFLOW),
        DINOv2Features(dinov2),
    ]
    assert all(isinstance(space, Features) for space in spaces)
    assert len({space.resize for space in spaces}) == 4
    assert len({space.hash for space in spaces}) == 3
    assert [space.dim for space in spaces] == [12, 2048, 2048, 24]


def test_inception_refuses_missing_and_other_weights(weights, tmp_path):
    with pytest.raises(UserError, match=r"no Inception weights at .*: copy pt_inception"):
        InceptionFeatures(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="SHA-256"):
        InceptionFeatures(weights[0])


def test_features_depend_on_the_8_bit_picture_alone(weights):
    pictures = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stored = ((pictures + 1) * 127.5).round().byte()
    for space in (CLIPFeatures(TinyCLIP()), InceptionFeatures(*weights)):
        rows = space(pictures)
        assert rows.shape == (2, space.dim)
        assert rows.std() > 0
        torch.testing.assert_close(rows, space(stored), rtol=0, atol=0)
        assert not rows.requires_grad
    assert CLIPFeatures(TinyCLIP())(stored).norm(dim=1) == pytest.approx(torch.ones(2), abs=1e-6)


def test_eight_bit_pictures_stay_and_floats_are_rounded():
    whole = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert eight_bit(whole) is whole
    assert eight_bit(whole / 127.5 - 1).equal(whole)
    assert eight_bit((whole / 127.5 - 1).double() * 1.001).equal(whole)  # half a level beyond


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "convert them to RGB"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "convert them to RGB"),
        (torch.zeros(3, 8, 8), "convert them to RGB"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "convert them to RGB"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int32), "8 bits a channel"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint16), "8 bits a channel"),
        (torch.full((2, 3, 8, 8), 255.0), r"in \[255, 255\]: give floats in \[-1, 1\]"),
        (torch.full((2, 3, 8, 8), -1.5), r"give floats in \[-1, 1\]"),
        (torch.full((2, 3, 8, 8), torch.nan), r"give floats in \[-1, 1\]"),
    ],
)
def test_other_pictures_are_refused(pictures, message):
    with pytest.raises(UserError, match=message):
        eight_bit(pictures)


def test_dinov2_gives_the_class_token_behind_the_last_norm(dinov2):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dinov2, local_files_only=True).eval()
    pictures = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    table = model.embeddings.position_embeddings.detach()
    # facebookresearch/dinov2: bicubic by the factor (16 + 0.1) / 5.
    grid = table[0, 1:].T.reshape(1, 24, 5, 5)
    grid = F.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")
    table = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 24)], dim=1)
    model.embeddings.position_embeddings = torch.nn.Parameter(table)
    with torch.no_grad():
        expected = model((pictures / 255 - mean) / std).pooler_output
    space = DINOv2Features(dinov2)
    torch.testing.assert_close(space(pictures), expected, rtol=1e-5, atol=1e-5)
    assert space(pictures[:, :, ::2, ::3]).shape == (2, 24)


def test_dinov2_refuses_what_is_none(dinov2, tmp_path):
    with pytest.raises(UserError, match=r"no config.json in .*: copy facebook/dinov2-large"):
        DINOv2Features(tmp_path)
    config = json.loads((dinov2 / "config.json").read_text())
    (dinov2 / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"model.safetensors lacks encoder.layer.2\.\S+ and \d+ more"
    ):
        DINOv2Features(dinov2)
    one = {k: v for k, v in config.items() if not k.startswith(("out_", "stage_"))}
    (dinov2 / "config.json").write_text(json.dumps({**one, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"also has encoder.layer.1\.\S+ and \d+ more"):
        DINOv2Features(dinov2)
    (dinov2 / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="has model_type bert, not dinov2"):
        DINOv2Features(dinov2)
    (dinov2 / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        DINOv2Features(dinov2)
    kept = (dinov2 / "model.safetensors").read_bytes()
    (dinov2 / "config.json").write_text(json.dumps(config))
    (dinov2 / "model.safetensors").write_bytes(kept[:-8])
    with pytest.raises(UserError, match="is cut short"):
        DINOv2Features(dinov2)
    (dinov2 / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors"):
        DINOv2Features(dinov2)
