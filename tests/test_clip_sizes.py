"""CLIPs of published sizes, and sizes that do not fit."""

from dataclasses import replace

import open_clip
import pytest
import torch

from cascade.config.compose import built, composed
from cascade.encoders.clip import Architecture, FrozenCLIP, save_clip
from cascade.encoders.sources import clip_model
from cascade.errors import UserError

VIT = Architecture(32, 8, 2, 32, text_width=32, text_layers=2, text_heads=2, length=16, patch=8)


def chosen(**choices):
    overrides = [f"{group}={choice}" for group, choice in choices.items()]
    return composed("train", ["data.path=none", "stage=clip", *overrides])


def count(*modules):
    parameters = [m.parameters() if isinstance(m, torch.nn.Module) else [m] for m in modules]
    return sum(p.numel() for part in parameters for p in part)


def test_unclips_clip_counts_what_its_pieces_are(vectors):
    config = chosen(clip="unclip", optim="clip_sam")
    with torch.device("meta"):
        clip = built(config.stage).clip
    assert vectors["clip_vit_h16_256px_and_text_params"] == {
        "image_blocks_32x1280": count(clip.visual.transformer),
        "image_patch16_embed": count(clip.visual.conv1),
        "image_pos_(16*16+1)": count(clip.visual.positional_embedding),
        "text_blocks_24x1024": count(clip.transformer),
        "text_token_embed_49408": count(clip.token_embedding),
    }
    assert clip.visual.proj.shape == (1280, 1024)
    assert clip.visual.transformer.resblocks[0].attn.num_heads == 16
    assert config.clip.model.dim == vectors["clip_embedding_scale"]["paper_dim"]


def test_a_frozen_clips_architecture_is_that_of_its_name():
    """conf/clip/vit_l_14 describes what open_clip knows as ViT-L-14."""
    config = chosen(clip="vit_l_14").clip
    with torch.device("meta"):
        ours, theirs = built(config.model).build(), open_clip.CLIP(**clip_model(config.path))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("choice", ["b_32", "b_16", "l_14", "h_14", "bigg_14"])
def test_text_choices_know_their_width_and_a_tag_that_exists(choice):
    config = chosen(text=f"clip_vit_{choice}").text
    reader = built(config.reader)
    assert reader.sizes["text"] == config.size
    assert open_clip.get_pretrained_cfg(reader.name, reader.checkpoint)


def test_sizes_are_known_without_weights(tmp_path):
    assert FrozenCLIP("ViT-L-14", "openai").sizes == {"clip_text": 768, "text": 768}
    assert FrozenCLIP(str(tmp_path)).sizes == {}
    save_clip(VIT, VIT.build(), tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    assert FrozenCLIP(str(tmp_path)).sizes == {"clip_text": 8, "text": 32}
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        _ = FrozenCLIP(str(tmp_path)).sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_heads": 5}, "text_heads=5 does not divide clip.model.text_width=32"),
        ({"patch": 5}, "patch=5 does not divide clip.model.image_size=32"),
        ({"head_width": 12}, "head_width=12 does not divide clip.model.vision_width=32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        replace(VIT, **change)
