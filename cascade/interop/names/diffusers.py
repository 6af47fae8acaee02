"""The names of a U-Net's tensors in diffusers, for blocks of ADM's kind."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from cascade.interop.names.rules import Rule, joined
from cascade.nets.attention import CrossAttention
from cascade.nets.blocks import Resample
from cascade.nets.unet import UNet

# Our modules, and those of diffusers: outside of the blocks, and in each residual block.
_ENDS = {
    "noise_level.1": "time_embedding.linear_1",
    "noise_level.3": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "modulation": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
}


def unet_rules(net: UNet, ours: str, theirs: str = "") -> Iterator[Rule]:
    """The rules for a U-Net; `ours` and `theirs` are what the names begin with."""
    for own, foreign in _ENDS.items():
        yield Rule(f"{theirs}{foreign}", f"{ours}{own}")
    yield from _way(net.down, f"{ours}down", f"{theirs}down_blocks", "downsamplers")
    yield from _way(net.up, f"{ours}up", f"{theirs}up_blocks", "upsamplers")
    middle = f"{theirs}mid_block"
    at = f"{middle}.resnets.0", f"{middle}.attentions.0"
    yield from _block(net.middle[0], f"{ours}middle.0", *at)
    yield from _block(net.middle[1], f"{ours}middle.1", f"{middle}.resnets.1", "")


def _way(blocks: nn.ModuleList, ours: str, theirs: str, resampling: str) -> Iterator[Rule]:
    level, place = 0, 0
    for k, block in enumerate(blocks):
        if block.resample != 1:
            yield from _block(block, f"{ours}.{k}", f"{theirs}.{level}.{resampling}.0", "")
            level, place = level + 1, 0
            continue
        of = f"{theirs}.{level}"
        at = f"{of}.resnets.{place}", f"{of}.attentions.{place}"
        yield from _block(block, f"{ours}.{k}", *at)
        place += 1


def _block(block: Any, ours: str, theirs: str, attention: str) -> Iterator[Rule]:
    if isinstance(block, Resample):
        yield Rule(f"{theirs}.conv", f"{ours}.conv")
        return
    for own, foreign in _BLOCK.items():
        yield Rule(f"{theirs}.{foreign}", f"{ours}.{own}")
    if isinstance(block.skip, nn.Conv2d):
        yield Rule(f"{theirs}.conv_shortcut", f"{ours}.skip")
    if (layer := block.attention) is None:
        return
    of, parts = f"{ours}.attention.", "q" if isinstance(layer, CrossAttention) else "qkv"
    yield Rule(f"{attention}.group_norm", f"{ours}.norm_attention")
    yield Rule([f"{attention}.to_{x}" for x in parts], f"{of}{parts}", joined)
    yield Rule(f"{attention}.to_out.0", f"{of}out")
    if layer.kv is not None:
        more = [f"{attention}.add_{x}_proj" for x in "kv"]
        yield Rule(more, f"{of}kv", joined)
    if isinstance(layer.norm_tokens, nn.GroupNorm):
        yield Rule(f"{attention}.norm_cross", f"{of}norm_tokens")
