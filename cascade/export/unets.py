"""U-Nets as diffusers' `UNet2DConditionModel` (told of text) or `UNet2DModel`.

Both have our residual blocks under other names. Resampling is part of a level's block in diffusers:
the one that we make before a level belongs to the level before it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade.export.layouts import Model, check_net, refused
from cascade.interop.names.diffusers import unet_rules
from cascade.nets.unet import UNet


def unet_model(
    net: UNet, config: Mapping[str, Any], size: int, where: str, shift: Tensor | None = None
) -> Model:
    """A U-Net in diffusers' terms.

    Args:
        config: the configuration of the network.
        size: the side of its pictures.
        where: the stage, for messages.
        shift: a vector that is always added to the noise-level embedding; None: there is none.

    Raises:
        UserError: diffusers has no such network.
    """
    check_net(config, "cascade.nets.unet.UNet", where)
    attends, heads = _check(config, where)
    told = config.get("width") is not None
    state = _state(net)
    if shift is not None:
        state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + shift
    norm = config["norm"]
    widths = [config["channels"] * m for m in config["multipliers"]]
    blocks = config["blocks"]
    about: dict[str, Any] = {
        "sample_size": size,
        "in_channels": 3 + config.get("image_channels", 0),
        "out_channels": 6 if config.get("learned_variance") else 3,
        "block_out_channels": widths,
        "layers_per_block": blocks if isinstance(blocks, int) else list(blocks),
        "norm_num_groups": norm["groups"],
        "norm_eps": norm.get("eps", 1e-5),
        "resnet_time_scale_shift": "default" if config.get("shift_only") else "scale_shift",
        "time_embedding_dim": config["embed"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "dropout": config.get("dropout", 0.0),
        "attention_head_dim": heads,
    }
    down, up = _kinds(attends, told, bool(config.get("strided")))
    about |= {"down_block_types": down, "up_block_types": up[::-1]}
    if told:
        about |= {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "cross_attention_dim": config["width"],
            "class_embed_type": "identity",
        }
        return Model("UNet2DConditionModel", about, state)
    kind = "conv" if config.get("strided") else "resnet"
    about |= {
        "add_attention": any(attends),
        "downsample_type": kind,
        "upsample_type": kind,
        "attn_norm_num_groups": norm["groups"],
    }
    return Model("UNet2DModel", about, state)


def _check(config: Mapping[str, Any], where: str) -> tuple[list[bool], int]:
    """Whether each level attends, and channels per head. UserError for what neither class has."""
    levels, attention = len(config["multipliers"]), list(config.get("attention") or [])
    told, heads = config.get("width") is not None, config.get("heads")
    head_channels = config.get("head_channels", 64)
    if attention and config.get("positions", True):
        raise refused(where, "net.positions", True, "false")
    if not (config.get("norm") or {}).get("groups"):
        raise refused(where, "net.norm.groups", None, "a number of groups")
    if (attention or told) and levels - 1 not in attention:
        raise refused(where, "net.attention", attention, f"the coarsest level, {levels - 1}, too")
    if told and config.get("strided"):
        raise refused(where, "net.strided", True, "false in a network that attends to text")
    widths = [config["channels"] * config["multipliers"][level] for level in attention]
    found = {width // heads if heads else min(head_channels, width) for width in widths}
    if len(found) > 1:
        # diffusers takes a list for the way down in reverse on the way up.
        setting = ("heads", heads) if heads else ("head_channels", head_channels)
        needed = f"heads of one width at all levels, as {min(found)}"
        raise refused(where, f"net.{setting[0]}", setting[1], needed)
    blocks = config["blocks"]
    if not told and not isinstance(blocks, int):
        raise refused(where, "net.blocks", list(blocks), "one number for all levels")
    return [level in attention for level in range(levels)], min(found, default=head_channels)


def _kinds(attends: Sequence[bool], told: bool, strided: bool) -> tuple[list[str], list[str]]:
    """The kinds of blocks by level, on the way down and on the way up."""
    attending = "SimpleCrossAttn{}Block2D" if told else "Attn{}Block2D"
    plain = (
        ("DownBlock2D", "UpBlock2D")
        if strided
        else (
            "ResnetDownsampleBlock2D",
            "ResnetUpsampleBlock2D",
        )
    )
    down = [attending.format("Down") if attend else plain[0] for attend in attends]
    up = [attending.format("Up") if attend else plain[1] for attend in attends]
    return down, up


def _state(net: UNet) -> dict[str, Tensor]:
    own = {key: value.detach().float().clone() for key, value in net.state_dict().items()}
    found: dict[str, Tensor] = {}
    for theirs, ours, _ in unet_rules(net, ""):
        names = [theirs] if isinstance(theirs, str) else theirs  # several are joined in ours
        for suffix in ("weight", "bias"):
            if (value := own.pop(f"{ours}.{suffix}", None)) is not None:
                parts = value.chunk(len(names))
                found |= {f"{name}.{suffix}": x.clone() for name, x in zip(names, parts)}
    assert not own, f"not exported: {sorted(own)[:3]}"
    return found


def level_of(stage: Any, where: str) -> Tensor | None:
    """The vector that a super-resolution stage's network is always given in sampling.

    Raises:
        UserError: the low-resolution picture is corrupted in sampling.
    """
    embedder, corruption = stage.conditioner.embedders["low"], stage.corruption
    if corruption is None:
        if embedder.level is not None:
            raise refused(where, "corruption", None, "one, which tells the noise level")
        return None
    batch = {embedder.key: torch.rand(1, 3, 8, 8) * 2 - 1, "sample": torch.zeros(1)}
    given = corruption(batch, lambda shape: torch.ones(shape), training=False)
    clean = torch.allclose(given[embedder.key], batch[embedder.key], atol=1e-4)
    if not clean or (corruption.late and corruption.level):
        raise refused(where, "level", corruption.level, "0: the picture as it is")
    if embedder.level is None:
        return None
    return embedder(given, torch.ones(1, dtype=torch.bool)).vector[0].detach()
