"""Small random modules of other systems, their files as published, and their samplers' noise."""

import math
from itertools import pairwise

import torch
from torch import nn

from cascade.cli import main
from cascade.draws import Draws
from cascade.encoders.architecture import Architecture
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.runs.run import Run

CAPTIONS = ["a red circle", "two blue squares above a large green triangle"]
SAMPLES = [3, 4]


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter random values, zero-initialised ones included.

    Outputs of U-Nets are small: with guidance, larger ones would make sampling chaotic, and
    rounding would decide what it paints.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            scale = (p[0].numel() ** -0.5) if p.ndim > 1 else 0.3
            p.copy_(scale * torch.randn(p.shape, generator=generator))
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
            if name.startswith(("conv_out.", "out.2.")):
                p.mul_(0.1)
    return module.eval()


def small_clip(folder, dim=24, width=32, length=20):
    """A random CLIP in open_clip's format, with embeddings far from unit norm."""
    architecture = Architecture(
        image_size=32, dim=dim, vision_layers=1, vision_width=16, text_width=width,
        text_layers=2, text_heads=2, length=length, patch=16, head_width=16,
    )  # fmt: skip
    torch.manual_seed(5)
    clip = architecture.build()
    with torch.no_grad():
        clip.text_projection.mul_(8)
        clip.visual.proj.mul_(8)
    save_clip(architecture, clip, folder)
    return folder


def batch(captions=CAPTIONS):
    return {"caption": list(captions), "sample": torch.tensor(SAMPLES[: len(captions)])}


def noises(seed, purpose, samples=SAMPLES):
    """A stage's draws in sampling: a function of the shape."""
    return Draws(seed, f"{purpose}//noise", samples)


def patched_noise(monkeypatch, module, draw):
    """Lets a scheduler of diffusers draw from a stage's streams."""
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: draw(tuple(shape)))


def legacy(qkv: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Interleaves projections by head, as OpenAI's networks store them: [head, part, channel]."""
    split = [x.reshape(heads, -1, *x.shape[1:]) for x in qkv]
    return torch.stack(split, 1).flatten(0, 2)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def schedule(scheduler, linear=False):
    """Sets a scheduler's tables to float64, as in the originals; the cosine one unless `linear`."""
    if linear:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    else:
        bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)]).double()
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    return scheduler


def encoded(clip, captions, length):
    """Raw embeddings, states and mask, padded to the full length, as Karlo encodes captions."""
    found = FrozenCLIP(str(clip), unit=False).text(captions)
    short = length - found["text"].shape[1]
    text = torch.nn.functional.pad(found["text"], (0, 0, 0, short))
    mask = torch.nn.functional.pad(found["text_mask"], (0, short))
    return found["clip_text"], text, mask


_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def adm_names(state, blocks, attends, heads):
    """A U-Net of diffusers in the names and layout of OpenAI's networks.

    Args:
        blocks, attends, heads: by level, the finest first: residual blocks, whether there is
            attention, and its number of heads.
    """
    out, levels = {}, len(blocks)

    def module(theirs, ours):
        for suffix in ("weight", "bias"):
            if f"{theirs}.{suffix}" in state:
                out[f"{ours}.{suffix}"] = state[f"{theirs}.{suffix}"].clone()

    def block(theirs, ours):
        for a, b in _BLOCK.items():
            module(f"{theirs}.{a}", f"{ours}.{b}")

    def attention(theirs, ours, n):
        module(f"{theirs}.group_norm", f"{ours}.norm")
        for suffix in ("weight", "bias"):
            for name, parts in (("qkv", [f"to_{x}" for x in "qkv"]),
                                ("encoder_kv", [f"add_{x}_proj" for x in "kv"])):  # fmt: skip
                there = [state.get(f"{theirs}.{part}.{suffix}") for part in parts]
                there = [x for x in there if x is not None]
                if there:
                    x = legacy(there, n)
                    out[f"{ours}.{name}.{suffix}"] = x[..., None] if suffix == "weight" else x
        module(f"{theirs}.norm_cross", f"{ours}.norm_encoder")
        module(f"{theirs}.to_out.0", f"{ours}.proj_out")
        out[f"{ours}.proj_out.weight"] = out[f"{ours}.proj_out.weight"][..., None]

    for theirs, ours in {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    }.items():  # fmt: skip
        module(theirs, ours)
    entry = 1
    for level in range(levels):
        for r in range(blocks[level]):
            block(f"down_blocks.{level}.resnets.{r}", f"input_blocks.{entry}.0")
            if attends[level]:
                at = f"down_blocks.{level}.attentions.{r}", f"input_blocks.{entry}.1"
                attention(*at, heads[level])
            entry += 1
        if level < levels - 1:
            block(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{entry}.0")
            entry += 1
    block("mid_block.resnets.0", "middle_block.0")
    if attends[-1]:
        attention("mid_block.attentions.0", "middle_block.1", heads[-1])
    block("mid_block.resnets.1", f"middle_block.{2 if attends[-1] else 1}")
    entry = 0
    for level in reversed(range(levels)):
        up = f"up_blocks.{levels - 1 - level}"
        for r in range(blocks[level] + 1):
            block(f"{up}.resnets.{r}", f"output_blocks.{entry}.0")
            if attends[level]:
                attention(f"{up}.attentions.{r}", f"output_blocks.{entry}.1", heads[level])
            if r == blocks[level] and level > 0:
                member = 2 if attends[level] else 1
                block(f"{up}.upsamplers.0", f"output_blocks.{entry}.{member}")
            entry += 1
    return out


def imported(kind, source, out, *overrides):
    """The stage of a run that `cascade import` wrote."""
    assert main(["import", kind, str(source), "--out", str(out), *overrides]) == 0
    return Run(out).load()


def spaced(*counts):
    """Indices of equal sections of 1000, each with this many even steps, the noisiest first."""
    found, size = [], 1000 // len(counts)
    for i, n in enumerate(counts):
        found += [i * size + round(k * (size - 1) / max(n - 1, 1)) for k in range(n)]
    return found[::-1]


def p_sample_loop(model, bars, steps, draw, shape, clip=lambda x0: x0.clamp(-1, 1)):
    """OpenAI's ancestral sampling with a learned range, on float64 tables.

    Args:
        model: (x, index) -> eps and range, guided already.
        bars: the cumulative products of all 1000 alphas.
    """
    x = draw(shape)
    for i, t in enumerate(steps):
        eps, v = (half.double() for half in model(x, t))
        now = bars[t]
        then = bars[steps[i + 1]] if i + 1 < len(steps) else torch.ones((), dtype=torch.float64)
        x0 = clip((x - (1 - now).sqrt() * eps) / now.sqrt())
        beta = 1 - now / then
        of_x0, of_x = then.sqrt() * beta, (now / then).sqrt() * (1 - then)
        mean = (of_x0 * x0 + of_x * x) / (1 - now)
        if i + 1 < len(steps):
            least = (beta * (1 - then) / (1 - now)).log()
            log = (v + 1) / 2 * beta.log() + (1 - v) / 2 * least
            mean = mean + (log / 2).exp() * draw(shape)
        x = mean.float()
    return x


def ddim_loop(model, bars, steps, x):
    """OpenAI's DDIM sampling with eta 0 and x0 clamped, on float64 tables."""
    for i, t in enumerate(steps):
        eps, now = model(x, t)[0].double(), bars[t]
        then = bars[steps[i + 1]] if i + 1 < len(steps) else torch.ones((), dtype=torch.float64)
        x0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        x = (then.sqrt() * x0 + (1 - then).sqrt() * eps).float()
    return x
