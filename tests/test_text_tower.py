"""The text tower that sampling loads computes, to the bit, what open_clip's CLIP computes."""

import dataclasses
import json
import subprocess
import sys

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.sources import default_of
from cascade.encoders.text import tokenize

CAPTIONS = ["", "a red circle", "Ein Bär & two naïve crosses – right of it " * 9]
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "width": 48, "heads": 4, "layers": 2},
}


def written(folder, model):
    """A CLIP of random weights in open_clip's format, and the same as open_clip's module."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**model).eval()
    for parameter in clip.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # zeros and ones would hide mistakes
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return clip.requires_grad_(False)  # otherwise torch computes attention in another way


def test_defaults_are_open_clips():
    for config in (open_clip.CLIPTextCfg, open_clip.CLIPVisionCfg):
        assert default_of(config.__name__) == dataclasses.asdict(config())


def test_tokens_are_open_clips():
    assert torch.equal(tokenize(CAPTIONS, 20), open_clip.tokenize(CAPTIONS, 20))


@pytest.mark.parametrize(
    ("options", "alone"),
    [({}, True), ({"quick_gelu": True}, True), ({"text_cfg": {"ls_init_value": 0.5}}, False)],
)
def test_captions_are_encoded_as_by_open_clip(tmp_path, options, alone):
    text = MODEL["text_cfg"] | options.get("text_cfg", {})
    clip = written(tmp_path, MODEL | options | {"text_cfg": text})
    frozen = FrozenCLIP(str(tmp_path))
    found = frozen.text(CAPTIONS)
    with torch.no_grad():
        expected = clip.forward_intermediates(
            text=open_clip.tokenize(CAPTIONS, 20), text_indices=1, normalize_intermediates=True
        )
    assert torch.equal(found["clip_text"], expected["text_features"])
    assert torch.equal(found["text"], expected["text_intermediates"][-1])
    assert ("_model" not in vars(frozen)) == alone
    assert frozen.length == 20


def test_painting_imports_no_training(tmp_path):
    """A process that only paints must not import modules that take seconds to load."""
    written(tmp_path, MODEL)
    code = (
        "import sys; import cascade.verbs.sample; from cascade.encoders.clip import FrozenCLIP;"
        f"FrozenCLIP({str(tmp_path)!r}).text(['a']);"
        "print(*sorted(m for m in sys.modules if '.' not in m or m == 'torch._dynamo'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"lightning", "torchmetrics", "transformers", "open_clip", "torchvision", "matplotlib"}
    assert not {*heavy, "scipy", "sympy", "torch._dynamo"} & set(done.stdout.split())
