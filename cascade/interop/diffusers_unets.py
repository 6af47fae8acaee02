"""U-Nets in diffusers' format: the settings that their configuration tells.

Only blocks of ADM's kind have a counterpart here: `Resnet*`, `SimpleCrossAttn*` and, without text,
`Attn*` blocks. Stable Diffusion's transformer blocks do not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cascade.encoders.weights import NotHere, read_json
from cascade.errors import UserError
from cascade.interop.files import DIFFUSERS, config_in, first_of, tensors_in
from cascade.interop.imported import Imported
from cascade.interop.names.diffusers import unet_rules
from cascade.interop.names.rules import Rule
from cascade.interop.priors import check_class, check_settings

# Down blocks that are represented, and whether they resample inside residual blocks.
_INSIDE = {
    "ResnetDownsampleBlock2D": True,
    "SimpleCrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "AttnDownBlock2D": False,  # or as `downsample_type` says
}
_ATTENDING = ("SimpleCrossAttnDownBlock2D", "AttnDownBlock2D")
_MIDDLES = ("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D")
_TABLES = {
    "linear": "cascade.diffusion.noise.linear_table",
    "squaredcos_cap_v2": "cascade.diffusion.noise.cosine_table",
}
_ONE_HEAD = 10**6  # channels per head: more than there are
_REQUIRED = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block"),
    *("down_block_types", "up_block_types", "sample_size"),
)
_NEEDED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "time_embedding_type": "positional",
    "dual_cross_attention": False,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "class_embeddings_concat": False,
    "timestep_post_act": None,
    "num_attention_heads": None,
    "attention_type": "default",
}


def unet_config(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration in a folder, and the arguments of our U-Net that it means.

    Raises:
        UserError: our network cannot represent it.
    """
    config = config_in(source)
    check_class(config, source, "UNet2DModel", "UNet2DConditionModel")
    check_settings(config, source, _NEEDED)
    if lacking := [key for key in _REQUIRED if config.get(key) is None]:
        raise UserError(f"{source}/config.json lacks {lacking[0]}: fetch it again")
    attends, strided = _levels(config, source)
    channels = config["block_out_channels"]
    if any(c % channels[0] for c in channels):
        raise UserError(f"{source}/config.json has block_out_channels={channels}: no multiples")
    scale, gelu = _scale(config, source), _gelu(config, source)
    head, groups = config.get("attention_head_dim"), config.get("norm_num_groups", 32)
    text = config["_class_name"] == "UNet2DConditionModel" and bool(attends)
    shift = config.get("resnet_time_scale_shift", "default")
    alone = bool(config.get("only_cross_attention"))
    _check_middle(config, source, groups, shift)
    return config, {
        "channels": channels[0],
        "multipliers": [c // channels[0] for c in channels],
        "blocks": _number(config["layers_per_block"]),
        "embed": config.get("time_embedding_dim") or 4 * channels[0],
        "attention": attends,
        "head_channels": _number(head) if head else _ONE_HEAD,
        "width": _number(config["cross_attention_dim"]) if text else None,
        "image_channels": config["in_channels"] - 3,
        "learned_variance": config["out_channels"] == 6,
        "shift_only": shift == "default",
        "strided": strided,
        "norm.groups": groups,
        "norm.eps": config.get("norm_eps", 1e-5),
        **({"block_scale": 1 / scale} if scale != 1 else {}),
        **({"activation._target_": "torch.nn.GELU"} if gelu else {}),
        **({"text_alone": True} if alone else {}),
        **({"token_groups": 32} if config.get("cross_attention_norm") == "group_norm" else {}),
    }


def _check_middle(config: Mapping[str, Any], source: Path, groups: int, shift: str) -> None:
    """Raises UserError if the attention in the middle is normalised in another way than others."""
    middle = config.get("attn_norm_num_groups") or (groups if shift == "default" else None)
    if (
        config["_class_name"] == "UNet2DModel"
        and config.get("add_attention", True)
        and middle != groups
    ):
        raise UserError(
            f"{source}/config.json normalises before the attention in the middle in {middle} "
            f"groups, and elsewhere in {groups}, which is not represented here"
        )


def _scale(config: Mapping[str, Any], source: Path) -> float:
    """By what each residual block's sum is divided. Raises UserError if that differs by block."""
    scale = config.get("resnet_out_scale_factor", 1.0) or 1.0
    if (middle := config.get("mid_block_scale_factor", 1.0)) != scale:
        raise UserError(
            f"{source}/config.json divides sums by {scale}, but in the middle by {middle}, which "
            "is not represented here"
        )
    return scale


def _gelu(config: Mapping[str, Any], source: Path) -> bool:
    """Whether every activation is GELU; otherwise SiLU. Raises UserError if they are mixed."""
    act, of_time = config.get("act_fn", "silu"), config.get("time_embedding_act_fn")
    # The noise level's embedding is activated either at once, or in each block.
    at_once = config.get("resnet_skip_time_act", False)
    if act not in ("silu", "swish", "gelu") or of_time != (act if at_once else None):
        raise UserError(
            f"{source}/config.json has act_fn={act} and time_embedding_act_fn={of_time}, which are "
            "not represented here"
        )
    return act == "gelu"


def _levels(config: Mapping[str, Any], source: Path) -> tuple[list[int], bool]:
    """The levels that attend, and whether convolutions resample between blocks."""
    down, up = config["down_block_types"], config["up_block_types"]
    mirrored = [name.replace("Down", "Up") for name in down[::-1]]
    odd = [name for name in down if name not in _INSIDE]
    odd += [name for name, same in zip(up, mirrored) if name != same]
    middle = config.get("mid_block_type") or _MIDDLES[0]
    odd += [middle] if middle not in _MIDDLES else []
    if odd:
        raise UserError(
            f"{source}/config.json has blocks {odd[0]}, which have no counterpart here: only "
            f"{', '.join(_INSIDE)} do, with the way up alike"
        )
    ways = {config.get(f"{way}sample_type", "conv") for way in ("down", "up")}
    inside = {**_INSIDE, "AttnDownBlock2D": "resnet" in ways}
    resamples = {inside[name] for name in down[:-1]}  # the last level does not
    attends = [name in _ATTENDING for name in down]
    if len(ways) > 1 or len(resamples) > 1 or attends[-1] != config.get("add_attention", True):
        raise UserError(
            f"{source}/config.json mixes ways to resample, or attends in the middle and not at the "
            "last level (or vice versa), which is not represented here"
        )
    return [level for level, there in enumerate(attends) if there], resamples != {True}


def _number(x: int | list[int]) -> int | list[int]:
    """One number for all levels, if they are the same."""
    return x[0] if isinstance(x, list) and len(set(x)) == 1 else x


def of_classes(source: Path, license: str) -> Imported:
    """Reads a `UNet2DModel` that is told classes; the table of its scheduler lies next to it.

    Raises:
        UserError: ours cannot represent it, or a file is missing or damaged.
    """
    system = "a U-Net of diffusers"
    config, net = unet_config(source)
    classes, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if not classes or kind is not None or net["image_channels"] or not net["learned_variance"]:
        raise UserError(
            f"{source}/config.json has num_class_embeds={classes}, class_embed_type={kind}, "
            f"in_channels={config['in_channels']} and out_channels={config['out_channels']}: only "
            "networks that are told classes and learned their variance are imported as they are"
        )
    schedule = _TABLES[_scheduler(source)]
    settings = {
        **{f"net.{key}": value for key, value in net.items()},
        "net.level.schedule.path": schedule,
        "process.mean.schedule.path": schedule,
        "classes": classes,
        "size": config["sample_size"],
    }
    path = first_of(source, DIFFUSERS, system)
    # Convolutions that resample are stored under either of two names, or under both.
    stored = tensors_in(path, system)
    tensors = {k.replace(".Conv2d_0.", ".conv."): v for k, v in stored.items()} | {
        k: v for k, v in stored.items() if ".Conv2d_0." not in k
    }
    files = [path, source / "config.json"]
    return Imported("adm_released", settings, tensors, _of_classes, system, license, files)


def _of_classes(stage: Any) -> Iterator[Rule]:
    yield from unet_rules(stage.net, "net.")
    yield Rule("class_embedding", "conditioner.embedders.label.embed")


def _scheduler(source: Path) -> str:
    """Reads the noise schedule of a network's scheduler. UserError if it is unknown."""
    path = source.parent / "scheduler/scheduler_config.json"
    if not path.is_file():
        raise NotHere(
            f"{path} is missing, without which the noise levels are unknown: put it there"
        )
    found = read_json(path)
    table, kind = found.get("beta_schedule"), found.get("prediction_type", "epsilon")
    ends = found.get("beta_start", 1e-4), found.get("beta_end", 0.02)
    if table not in _TABLES or kind != "epsilon" or (table == "linear" and ends != (1e-4, 0.02)):
        raise UserError(f"{path} has {table} betas and predicts {kind}, which is not imported")
    return table
