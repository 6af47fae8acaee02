"""Small random cascades on disk, without any training."""

import torch
from omegaconf import OmegaConf

from cascade.config.compose import built, composed, saved
from cascade.encoders.clip import save_clip
from cascade.runs.run import Run

CLIP = [
    "clip.model.image_size=32", "clip.model.dim=12", "clip.model.vision_width=8",
    "clip.model.text_width=16", "clip.model.text_layers=1", "clip.model.length=16",
]  # fmt: skip
PRIOR = ["stage=prior", "net.width=16", "net.layers=1", "net.heads=2", "sampler.steps=2", *CLIP]
DECODER = [
    "stage=decoder", "size=16", "net.channels=8", "net.blocks=1", "net.head_channels=8",
    "net.embed=16", "net.width=16", "text.size=16", "text.encoder.layers=1",
    "text.encoder.embed=4", "sampler.steps=2", *CLIP,
]  # fmt: skip


def write_clip(folder, seed=0):
    torch.manual_seed(seed)
    architecture = built(composed("train", ["data.path=none", "stage=clip", *CLIP]).clip.model)
    clip = architecture.build()
    save_clip(architecture, clip, folder)


def write_run(folder, overrides, seed=0):
    """A run with random weights of some size; networks start as zeros."""
    config = composed("train", ["data.path=/data/secret", f"run={folder}", *overrides])
    saved(config, folder / "config.yaml")
    torch.manual_seed(seed)
    stage = built(config.stage)
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stage.export(folder)
    Run(folder).write_status(64, 64)


def write_model(root, **choices):
    """A prior and a decoder, with a weaker run for autoguidance, and their CLIP."""
    write_clip(root / "clip")
    clip = f"clip.path={root / 'clip'}"
    write_run(root / "prior", [*PRIOR, clip])
    write_run(root / "decoder", [*DECODER, clip], seed=1)
    write_run(root / "early", [*DECODER, clip], seed=2)
    stages = {"prior": {"best_of": 2}, "decoder": {"scale": 2.0, "weaker": "early"}}
    (root / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": {**stages, **choices}}))
