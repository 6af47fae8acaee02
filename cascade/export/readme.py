"""The README of a folder for diffusers, with code that samples as the cascade does."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cascade.conditioning import pictures
from cascade.export.layouts import refused

_WAYS: Mapping[Callable[..., Any], str] = {
    pictures.enlarge: 'mode="bicubic"',
    pictures.enlarge_antialiased: 'mode="bicubic", antialias=True',
    pictures.enlarge_linear: 'mode="bilinear"',
    pictures.enlarge_aligned: 'mode="bilinear", align_corners=True',
}
_FRONT = ("---", "library_name: diffusers", "pipeline_tag: text-to-image", "---")


class Small(NamedTuple):
    """How the small picture is given to a super-resolution network.

    Attributes:
        factor: by which it is enlarged.
        way: arguments of torch's `interpolate`.
        rounded: to 8 bits, first.
    """

    factor: int
    way: str
    rounded: bool


def small_of(low: Any, where: str) -> Small:
    """How a stage's embedder enlarges. UserError if torch's function has no such way."""
    if low.enlarge not in _WAYS:
        raise refused(where, "embedders.low.enlarge", low.enlarge.__name__, "interpolation")
    return Small(low.factor, _WAYS[low.enlarge], low.rounded)


class Text(NamedTuple):
    """The length of GLIDE's captions in tokens, and the number of tokens without padding."""

    length: int
    vocabulary: int


class Stage(NamedTuple):
    """How a stage is sampled.

    Attributes:
        name: its folder.
        scheduler, net: classes of diffusers.
        steps: indices of the noise levels.
        scale: of guidance.
        folders: of its networks; the second, if there is one, makes the last step.
        size: side of its pictures.
        deviation: of the noise that sampling starts with.
        label: whether it is told a class.
    """

    name: str
    scheduler: str
    steps: Sequence[int]
    scale: float
    net: str = ""
    folders: tuple[str, ...] = ()
    size: int = 0
    deviation: float = 1.0
    small: Small | None = None
    text: Text | None = None
    label: bool = False


def of_pipeline(steps: Mapping[str, int], scales: Mapping[str, float]) -> Iterator[str]:
    """The README of a whole `UnCLIPPipeline`.

    Args:
        steps, scales: of sampling and guidance, by the part of the pipeline.
    """
    yield from _FRONT
    yield "A pipeline of diffusers. Since 0.39, its own loader does not find the module of"
    yield "`UnCLIPPipeline`, so that has to be named first. Its schedulers round their tables to"
    yield "float32, where 1 - (1 - 4e-5) is 5e-4 off, so that the last step of each is; in double"
    yield "precision it paints the pixels that Cascade paints:"
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
    yield "for part in (pipeline.prior_scheduler, pipeline.decoder_scheduler,"
    yield "             pipeline.super_res_scheduler):"
    yield "    part.betas = part.betas.double().clamp(max=0.999)"
    yield "    part.alphas = 1 - part.betas"
    yield "    part.alphas_cumprod = part.alphas.cumprod(0)"
    yield "images = pipeline("
    yield '    "a red circle above a blue square",'
    yield from (f"    {kind}_num_inference_steps={count}," for kind, count in steps.items())
    yield from (f"    {kind}_guidance_scale={scale}," for kind, scale in scales.items())
    yield ").images"
    yield "```"


def of_stages(stages: Sequence[Stage]) -> Iterator[str]:
    """The README of networks that make no pipeline."""
    yield from _FRONT
    yield "Networks and schedulers of diffusers, each to load by its class."
    for stage in stages:
        yield ""
        yield f"## {stage.name}"
        yield ""
        if stage.folders:
            yield "```python"
            yield from _loading(stage)
            yield from _sampling(stage)
            yield "```"
        else:
            yield f"`{stage.scheduler}` in {len(stage.steps)} steps, guidance {stage.scale}."


def _loading(stage: Stage) -> Iterator[str]:
    yield "import torch"
    if stage.small:
        yield "import torch.nn.functional as F"
    yield f"from diffusers import {', '.join(sorted((stage.scheduler, stage.net)))}"
    if stage.text:
        yield "from transformers import PreTrainedTokenizerFast, SiglipTextModel"
    yield ""
    yield f'STAGE = f"{{FOLDER}}/{stage.name}"'
    for name, folder in zip(("unet", "last"), stage.folders):
        yield f'{name} = {stage.net}.from_pretrained(STAGE, subfolder="{folder}")'
    if stage.text:
        yield 'text = SiglipTextModel.from_pretrained(STAGE, subfolder="text_encoder")'
        yield 'tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{STAGE}/tokenizer")'
    yield f'scheduler = {stage.scheduler}.from_pretrained(STAGE, subfolder="scheduler")'
    numbers = textwrap.wrap(", ".join(map(str, stage.steps)), 92)
    yield from ("scheduler.set_timesteps(timesteps=[", *(f"    {x}" for x in numbers), "])")
    yield ""


def _sampling(stage: Stage) -> Iterator[str]:
    given = "captions" if stage.text else "labels" if stage.label else "small"
    if stage.text:
        yield 'captions = ["a red circle", "a blue square"]'
    if stage.label:
        yield "labels = torch.tensor([3, 9])"
    if stage.small:
        side = stage.size // stage.small.factor
        yield f"small = torch.zeros(2, 3, {side}, {side})  # in [-1, 1]"
        if stage.small.rounded:
            yield "small = ((small + 1) * 127.5).round() / 127.5 - 1"
        way = f"scale_factor={stage.small.factor}, {stage.small.way}"
        yield f"large = F.interpolate(small, {way})"
    yield f"n = len({given})"
    yield ""
    yield ""
    yield from _call(stage)
    yield ""
    yield ""
    factor = "" if abs(stage.deviation - 1) < 1e-7 else f"{stage.deviation:.8f} * "
    yield f"x = {factor}torch.randn(n, 3, {stage.size}, {stage.size})"
    yield "with torch.no_grad():"
    yield "    for t in scheduler.timesteps:"
    yield f"        out = predicted(x, t{', captions' if stage.text else ''})"
    if stage.scale != 1:
        yield '        null = predicted(x, t, [""] * n)[:, :3]'
        yield f"        eps = null + {stage.scale} * (out[:, :3] - null)"
        yield "        out = torch.cat([eps, out[:, 3:]], 1)"
    yield "        x = scheduler.step(out, t, x).prev_sample"
    yield "pictures = x.clamp(-1, 1)"


def _call(stage: Stage) -> Iterator[str]:
    """The function that calls the network."""
    net = "(last if t == 0 else unet)" if len(stage.folders) > 1 else "unet"
    x = "torch.cat([x, large], 1)" if stage.small else "x"
    if not stage.text:
        told = ", class_labels=labels" if stage.label else ""
        yield "def predicted(x, t):"
        yield f"    return {net}({x}, t{told}).sample"
        return
    length, words = stage.text
    yield "def predicted(x, t, captions):"
    yield f"    rows = [tokenizer(text.lower()).input_ids[:{length}] for text in captions]"
    yield "    # Padding has a different token at each position."
    yield f"    rows = [row + list(range({words} + len(row), {words + length})) for row in rows]"
    yield "    found = text(torch.tensor(rows, dtype=torch.long))"
    yield "    states, vector = found.last_hidden_state, found.pooler_output"
    yield f"    return {net}({x}, t, states, class_labels=vector).sample"
