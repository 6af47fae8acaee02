"""A cascade as a folder of diffusers: `UnCLIPPipeline`, or networks and schedulers by stage.

A prior, a decoder and one super-resolution stage in Karlo's layout make a pipeline. Other stages
are written each alone. What diffusers cannot represent is refused, with the setting that stands in
the way.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cascade.codecs import Pixels
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.export import readme
from cascade.export.alone import write_alone
from cascade.export.layouts import VERSION, Model, refused, write_json, write_network
from cascade.export.model import Part, parts_of
from cascade.export.priors import prior_model, text_projection
from cascade.export.samplers import pipeline_scheduler, sampled
from cascade.export.texts import text_model
from cascade.export.tokenizer import write_tokenizer
from cascade.export.unets import level_of, unet_model

_INDEX = {
    "_class_name": "UnCLIPPipeline",
    "_diffusers_version": VERSION,
    "prior": ["diffusers", "PriorTransformer"],
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
}
_KINDS = ("prior", "decoder", "super_res")
# Choices that name other runs, and what diffusers needs instead.
_OTHER_RUNS = {"weaker": "guidance by the stage itself", "controls": "no ControlNets"}


def write_diffusers(model: Path, folder: Path) -> None:
    """Writes a cascade in the layout of diffusers.

    Raises:
        UserError: a stage cannot be loaded, or diffusers has no counterpart of it.
    """
    parts = parts_of(model)
    for part, (choice, needed) in product(parts, _OTHER_RUNS.items()):
        if value := (part.choices or {}).get(choice):
            raise refused(part.name, choice, value, needed)
    kinds = [_kind(part) for part in parts]
    folder.mkdir()
    if sorted(kinds) == sorted(_KINDS):
        lines = _write_pipeline(dict(zip(kinds, parts)), model, folder)
    else:
        lines = readme.of_stages([write_alone(part, folder / part.name) for part in parts])
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _kind(part: Part) -> str:
    codec, reads = part.stage.codec, part.stage.conditioner.reads
    if not isinstance(codec, Pixels):
        return "prior"
    if codec.low:
        return "super_res"
    return "decoder" if "clip_image" in reads else "another decoder"


def _write_pipeline(parts: Mapping[str, Part], model: Path, folder: Path) -> Iterator[str]:
    """Writes the parts of an `UnCLIPPipeline`; returns the lines of its README."""
    stages = {kind: sampled(part, whole=True) for kind, part in parts.items()}
    for kind, part in parts.items():
        config = pipeline_scheduler(stages[kind], part)
        write_json(folder / f"{kind}_scheduler/scheduler_config.json", config)
        for name, one in _models(kind, part, stages[kind]):
            write_network(one, folder / name)
    encoders = [encoder for part in parts.values() for encoder in part.stage.encoders]
    clips = {one.hash: one for one in encoders if isinstance(one, FrozenCLIP)}
    if len(clips) > 1:
        raise UserError(f"{model} reads with several CLIPs, and a pipeline has one: use one")
    for clip in clips.values():
        write_network(text_model(clip, "clip"), folder / "text_encoder")
        write_tokenizer(folder / "tokenizer", clip.length)
    write_json(folder / "model_index.json", _INDEX)
    steps = {kind: stages[kind].sampler.steps for kind in _KINDS}
    scales = {kind: stages[kind].sampler.scale for kind in _KINDS[:2]}
    return readme.of_pipeline(steps, scales)


def _models(kind: str, part: Part, stage: Any) -> Iterator[tuple[str, Model]]:
    """The networks of a stage, by the names of their folders."""
    config, name = part.run.config.stage, part.name
    if kind == "prior":
        yield "prior", prior_model(stage, config, name)
        return
    if kind == "decoder":
        yield "text_proj", text_projection(stage, name)
        yield "decoder", unet_model(stage.net, config.net, stage.codec.size, name)
        return
    if set(stage.conditioner.embedders) != {"low"}:
        found = ", ".join(stage.conditioner.embedders)
        raise refused(name, "stage.conditioner.embedders", found, "low alone")
    _check_enlargement(stage, name)
    shift = level_of(stage, name)
    nets = [(stage.net, config.net)] * 2
    if str(config.net._target_).endswith(".ByLevel"):
        nets = [(stage.net.net, config.net.net), (stage.net.last, config.net.net)]
    for folder, (net, of) in zip(("super_res_first", "super_res_last"), nets):
        yield folder, unet_model(net, of, stage.codec.size, name, shift)


def _check_enlargement(stage: Any, where: str) -> None:
    low = stage.conditioner.embedders["low"]
    x = torch.rand(1, 3, 8, 8)
    batch = {low.key: x, f"{low.key}_level": torch.zeros(1)}
    found = low(batch, torch.ones(1, dtype=torch.bool)).image
    wanted = torch.nn.functional.interpolate(
        x, scale_factor=low.factor, mode="bicubic", antialias=True
    )
    if not torch.allclose(found, wanted, atol=1e-5):
        place = "embedders.low.enlarge"
        raise refused(where, place, "another way", "anti-aliased bicubic enlargement")
