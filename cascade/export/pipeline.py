"""A cascade as a folder of diffusers: its networks and schedulers, and `UnCLIPPipeline` of them.

A prior, a decoder and one super-resolution stage in Karlo's layout make a pipeline. Other stages
are written as networks and schedulers alone. What diffusers cannot represent is refused, with the
setting that stands in the way.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cascade.codecs import Pixels
from cascade.diffusion.guidance import extrapolate, static_threshold
from cascade.diffusion.solvers import ancestral
from cascade.diffusion.spacing import sections
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.export.layouts import Model, check_process, refused
from cascade.export.model import Part, parts_of
from cascade.export.priors import prior_model, text_projection
from cascade.export.texts import text_model
from cascade.export.tokenizer import write_tokenizer
from cascade.export.unets import level_of, unet_model
from cascade.runs.choices import SamplingChoices

_VERSION = "0.36.0"  # of diffusers, whose layout this is
_WEIGHTS = {"CLIPTextModelWithProjection": "model.safetensors"}
_INDEX = {
    "_class_name": "UnCLIPPipeline",
    "_diffusers_version": _VERSION,
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
_CHOICES = ("scale", "steps", "level")  # that the caller of the pipeline makes, or that are checked


def write_diffusers(model: Path, folder: Path) -> None:
    """Writes a cascade in the layout of diffusers.

    Raises:
        UserError: a stage cannot be loaded, or diffusers has no counterpart of it.
    """
    parts = parts_of(model)
    kinds = [_kind(part) for part in parts]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise UserError(
            f"{model} has {kinds.count(twice[0])} stages of the kind {twice[0]}, and a folder of "
            "diffusers holds one: leave the others out of the cascade's file, or use --format card"
        )
    whole = set(kinds) == {"prior", "decoder", "super_res"}
    folder.mkdir()
    for kind, part in zip(kinds, parts):
        stage = _sampled(part)
        (folder / f"{kind}_scheduler").mkdir()
        _write_json(folder / f"{kind}_scheduler/scheduler_config.json", _scheduler(stage, part))
        for name, one in _models(kind, part, stage, whole):
            _write(one, folder / name)
    clips = {e.hash: e for part in parts for e in part.stage.encoders if isinstance(e, FrozenCLIP)}
    if len(clips) > 1:
        raise UserError(f"{model} reads with several CLIPs, and a pipeline has one: use one")
    for clip in clips.values():
        _write(text_model(clip, "clip"), folder / "text_encoder")
        write_tokenizer(folder / "tokenizer", clip.length)
    if whole:
        _write_json(folder / "model_index.json", _INDEX)
    (folder / "README.md").write_text("\n".join(_readme(kinds, parts, whole)) + "\n")


def _kind(part: Part) -> str:
    if not part.sampled:
        raise refused(part.name, "weaker", part.name, "guidance by the stage itself")
    codec = part.stage.codec
    if isinstance(codec, Pixels):
        return "super_res" if codec.low else "decoder"
    return "prior"


def _sampled(part: Part) -> Any:
    """The stage with the cascade's choices. UserError for those that no pipeline makes."""
    choices = part.choices or {}
    if other := [key for key, value in choices.items() if value and key not in _CHOICES]:
        raise refused(part.name, other[0], choices[other[0]], "it to be left out")
    stage: Any = SamplingChoices.of(part.name, choices).applied(part.stage, part.run)
    sampler = stage.sampler
    for name, wanted in (("solver", ancestral), ("spacing", sections), ("guide", extrapolate)):
        if (found := getattr(sampler, name, None)) is not wanted:
            found = getattr(found, "__name__", found)
            raise refused(part.name, f"sampler.{name}", found, wanted.__name__)
    for name, plain in (("interval", None), ("init", 1.0)):
        if (found := getattr(sampler, name)) != plain:
            raise refused(part.name, f"sampler.{name}", found, str(plain))
    return stage


def _scheduler(stage: Any, part: Part) -> dict[str, Any]:
    prediction, variance = check_process(part.run.config.stage, part.name)
    limit = _limit(stage.sampler.threshold, part.name)
    return {
        "_class_name": "UnCLIPScheduler",
        "_diffusers_version": _VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "variance_type": variance,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": limit is not None,
        "clip_sample_range": limit or 1.0,
    }


def _limit(threshold: Any, where: str) -> float | None:
    """The limit of a static threshold; None: there is none. UserError for another kind."""
    if threshold is None:
        return None
    plain = threshold.func if isinstance(threshold, partial) else threshold
    if plain is not static_threshold:
        name = getattr(plain, "__name__", str(plain))
        raise refused(where, "sampler.threshold", name, "static_threshold or none")
    return threshold.keywords.get("limit", 1.0) if isinstance(threshold, partial) else 1.0


def _models(kind: str, part: Part, stage: Any, whole: bool) -> Iterator[tuple[str, Model]]:
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
    if whole:
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


def _write(model: Model, folder: Path) -> None:
    folder.mkdir()
    about = {} if "architectures" in model.config else {"_class_name": model.kind}
    about |= {} if "architectures" in model.config else {"_diffusers_version": _VERSION}
    _write_json(folder / "config.json", {**about, **model.config})
    file = _WEIGHTS.get(model.kind, "diffusion_pytorch_model.safetensors")
    save_file(model.state, folder / file, {"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _readme(kinds: Sequence[str], parts: Sequence[Part], whole: bool) -> Iterator[str]:
    steps = {kind: _sampled(part).sampler for kind, part in zip(kinds, parts)}
    yield "---"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    yield "---"
    if not whole:
        yield "Networks and schedulers of diffusers, each to load by its class, such as"
        yield "`UNet2DModel.from_pretrained(FOLDER, subfolder=...)`:"
        yield ""
        yield from (f"* `{kind}`: {sampler.steps} steps" for kind, sampler in steps.items())
        return
    yield "A pipeline of diffusers. Since 0.39, its own loader does not find the module of"
    yield "`UnCLIPPipeline`, so that has to be named first:"
    yield ""
    yield "```python"
    yield "import diffusers"
    yield "from diffusers import UnCLIPPipeline"
    yield ""
    yield 'if not hasattr(diffusers.pipelines, "unclip"):'
    yield "    from diffusers.pipelines.deprecated import unclip"
    yield ""
    yield "    diffusers.pipelines.unclip = unclip"
    yield "pipeline = UnCLIPPipeline.from_pretrained(FOLDER)"
    yield 'pipeline("a red circle above a blue square",'
    yield from (
        f"    {kind}_num_inference_steps={sampler.steps}," for kind, sampler in steps.items()
    )
    scales = {kind: steps[kind].scale for kind in ("prior", "decoder")}
    yield from (f"    {kind}_guidance_scale={scale}," for kind, scale in scales.items())
    yield ").images[0]"
    yield "```"
