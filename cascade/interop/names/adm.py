"""The names of a U-Net's tensors in the family of ADM, and the sizes that their shapes tell.

guided-diffusion, GLIDE, Karlo and DeepFloyd IF share these names. Their networks resample inside
residual blocks, whose names do not tell; but an entry of the way up that ends a level has one block
more, so the levels follow from there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cascade.errors import UserError
from cascade.interop.names.rules import Rule, by_heads, count, matrix
from cascade.nets.attention import CrossAttention
from cascade.nets.blocks import Resample
from cascade.nets.unet import UNet

HEAD_CHANNELS = 64  # of each attention head, which no file tells

_BLOCK = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "modulation": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
}
_ENDS = {
    "noise_level.1": "time_embed.0",
    "noise_level.3": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}


def adm_rules(net: UNet, ours: str, theirs: str = "", legacy: bool = True) -> Iterator[Rule]:
    """The rules for a U-Net.

    Args:
        net: ours, of the same sizes.
        ours, theirs: what the names begin with.
        legacy: whether queries, keys and values are interleaved by head, as in all networks but
            guided-diffusion's at 64 px.
    """
    for own, foreign in _ENDS.items():
        yield Rule(f"{theirs}{foreign}", f"{ours}{own}")
    for k, block in enumerate(net.down):
        yield from _entry(block, f"{ours}down.{k}", f"{theirs}input_blocks.{k + 1}", legacy)
    last = 2 if net.middle[0].attention is not None else 1
    middle = f"{theirs}middle_block"
    yield from _block(net.middle[0], f"{ours}middle.0", f"{middle}.0", f"{middle}.1", legacy)
    yield from _block(net.middle[1], f"{ours}middle.1", f"{middle}.{last}", "", legacy)
    entry, members = -1, 0
    for k, block in enumerate(net.up):
        if block.resample > 1:  # the last member of the entry before
            at = f"{theirs}output_blocks.{entry}.{members}"
            yield from _block(block, f"{ours}up.{k}", at, "", legacy)
            continue
        entry, members = entry + 1, 1 if block.attention is None else 2
        yield from _entry(block, f"{ours}up.{k}", f"{theirs}output_blocks.{entry}", legacy)


def _entry(block: nn.Module, ours: str, theirs: str, legacy: bool) -> Iterator[Rule]:
    return _block(block, ours, f"{theirs}.0", f"{theirs}.1", legacy)


def _block(block: Any, ours: str, theirs: str, attention: str, legacy: bool) -> Iterator[Rule]:
    if isinstance(block, Resample):
        yield Rule(f"{theirs}.{'op' if block.resample < 1 else 'conv'}", f"{ours}.conv")
        return
    for own, foreign in _BLOCK.items():
        yield Rule(f"{theirs}.{foreign}", f"{ours}.{own}")
    if isinstance(block.skip, nn.Conv2d):
        yield Rule(f"{theirs}.skip_connection", f"{ours}.skip")
    if (layer := block.attention) is None:
        return
    of, parts = f"{ours}.attention.", 1 if isinstance(layer, CrossAttention) else 3
    yield Rule(f"{attention}.norm", f"{ours}.norm_attention")
    rows = by_heads(layer.heads, parts) if legacy else matrix
    yield Rule(f"{attention}.qkv", f"{of}{'q' if parts == 1 else 'qkv'}", rows)
    yield Rule(f"{attention}.proj_out", f"{of}out", matrix)
    if layer.kv is not None:
        rows = by_heads(layer.heads, 2) if legacy else matrix
        yield Rule(f"{attention}.encoder_kv", f"{of}kv", rows)
    if isinstance(layer.norm_tokens, nn.GroupNorm):
        yield Rule(f"{attention}.norm_encoder", f"{of}norm_tokens")


def adm_sizes(tensors: Mapping[str, Tensor], where: object) -> dict[str, Any]:
    """The arguments of our U-Net, as far as shapes tell them, with the family's width of a head.

    Raises:
        UserError: the tensors are not of such a network.
    """

    def rows(name: str, axis: int = 0) -> int:
        if name not in tensors:
            raise UserError(
                f"{where} lacks {name}, which a U-Net of ADM's family has: give its weights"
            )
        return tensors[name].shape[axis]

    channels, out = rows("input_blocks.0.0.weight"), rows("out.2.weight")
    if not all(levels := _levels(tensors)):
        raise UserError(f"{where} lacks entries of output_blocks: give the whole weights")
    widths = [rows(f"output_blocks.{level[0]}.0.out_layers.3.weight") for level in levels]
    queries = [f"output_blocks.{level[0]}.1.qkv.weight" for level in levels]
    attends = [level for level, name in enumerate(queries) if name in tensors]
    blocks = [len(level) - 1 for level in levels]
    if out not in (3, 6) or any(width % channels for width in widths) or min(blocks, default=0) < 1:
        raise UserError(f"{where} is of a U-Net of another kind: give the weights of this system")
    first = "output_blocks.0.0."
    shift_only = rows(f"{first}emb_layers.1.weight") == widths[-1]
    tokens = [x for name, x in tensors.items() if name.endswith(".encoder_kv.weight")]
    return {
        "channels": channels,
        "head_channels": HEAD_CHANNELS,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks[0] if len(set(blocks)) == 1 else blocks,
        "embed": rows("time_embed.2.weight"),
        "attention": attends,
        "width": tokens[0].shape[1] if tokens else None,
        "image_channels": rows("input_blocks.0.0.weight", 1) - 3,
        "learned_variance": out == 6,
        "shift_only": shift_only,
        "strided": any(name.endswith(".op.weight") for name in tensors),
    }


def _levels(tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """The entries of the way up that belong to each level, the finest level first."""
    levels: list[list[int]] = [[]]
    for entry in range(count(tensors, "output_blocks.N")):
        levels[-1].append(entry)
        more = [f"output_blocks.{entry}.{k}" for k in (1, 2)]
        ends = [f"{at}.{part}.weight" for at in more for part in ("in_layers.0", "conv")]
        if any(name in tensors for name in ends):
            levels.append([])
    return levels[::-1]
