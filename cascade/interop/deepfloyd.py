"""DeepFloyd IF's stages I and II, as published and in diffusers' format."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.interop.diffusers_unets import unet_config
from cascade.interop.files import DIFFUSERS, first_of, tensors_in, yaml_in
from cascade.interop.imported import Imported
from cascade.interop.names.adm import adm_rules, adm_sizes
from cascade.interop.names.diffusers import unet_rules
from cascade.interop.names.rules import Rule, joined

LICENSE = "DeepFloyd IF License (LICENSE-MODEL of deep-floyd/IF): research, not commercial"
FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.safetensors")
EXPERIMENTS = {"I": "if_i_released", "II": "if_ii_released"}
ENLARGED = 4  # times, from stage I to II
_ACTIVATIONS = {"gelu": "none", "gelu_jit": "tanh"}  # the way that GELU is computed
_CAPTION, _LOW = "conditioner.embedders.caption", "conditioner.embedders.low"
_POOL = "encoder_pooling.1."


def stage(source: Path, number: str) -> Imported:
    """Reads a stage from its folder, which holds its config.yml and weights, or those of diffusers.

    Args:
        number: I or II.

    Raises:
        UserError: a file is missing or damaged, or they do not belong together.
    """
    system = f"DeepFloyd IF, stage {number}"
    folder = source if source.is_dir() else source.parent
    if (folder / "config.json").is_file():
        return _of_diffusers(folder, number, system)
    params = yaml_in(folder / "config.yml").get("params")
    path = source if source.is_file() else first_of(source, FILES, system)
    tensors = tensors_in(path, system)
    if not isinstance(params, dict):
        raise UserError(f"{folder}/config.yml has no params: fetch it again")
    sizes = adm_sizes(tensors, path)
    _check(params, sizes, folder)
    size = tensors["encoder_pooling.2.weight"].shape[1]
    heads = params.get("num_head_channels", -1)
    settings = {
        **{f"net.{key}": value for key, value in sizes.items()},
        **({"net.head_channels": heads} if heads > 0 else {"net.heads": params["num_heads"]}),
        "net.text_alone": alone(tensors, path),
        "net.block_scale": 0.7071 if params.get("scale_skip_connection") else 1.0,
        "net.activation.approximate": _ACTIVATIONS[params["activation"]],
        f"stage.{_CAPTION}.project": "encoder_proj.weight" in tensors,
        **_common(number, size, params.get("att_pool_heads", 64), params["image_size"]),
    }
    files = [path, folder / "config.yml"]
    return Imported(EXPERIMENTS[number], settings, tensors, _rules, system, LICENSE, files)


def _check(params: Mapping[str, Any], sizes: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if config.yml and the weights contradict each other, or IF's network."""
    names = {
        "model_channels": "channels",
        "num_res_blocks": "blocks",
        "channel_mult": "multipliers",
    }
    for key, ours in names.items():
        found = params.get(key)
        if isinstance(found, str):
            found = [int(x) for x in found.split(",")]
        if isinstance(found, list) and key == "num_res_blocks" and len(set(found)) == 1:
            found = found[0]
        if found is not None and found != sizes[ours]:
            raise UserError(
                f"{folder}/config.yml has {key}={found}, but the weights {sizes[ours]}: give the "
                "files that belong together"
            )
    if (found := params.get("activation")) not in _ACTIVATIONS:
        raise UserError(f"{folder}/config.yml has activation={found}: only gelu is imported")
    if params.get("interpolate_mode", "bilinear") != "bilinear":
        raise UserError(f"{folder}/config.yml enlarges in another way than bilinearly")


def _common(number: str, size: int, heads: int, side: int) -> dict[str, Any]:
    return {
        "text.size": size,
        f"stage.{_CAPTION}.pool.heads": heads,
        "size": side,
        **({"low": side // ENLARGED} if number == "II" else {}),
    }


def alone(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether all attention is to text alone. Raises UserError if that differs by level."""
    queries = [x.shape[0] == x.shape[1] for k, x in tensors.items() if k.endswith(".qkv.weight")]
    if len(set(queries)) > 1:
        raise UserError(f"{path} has self-attention at some levels and not at others")
    return queries[0]


def _rules(stage: Any) -> Iterator[Rule]:
    yield from adm_rules(stage.net, "net.")
    if isinstance(stage.conditioner.embedders["caption"].to_tokens, torch.nn.Linear):
        yield Rule("encoder_proj", f"{_CAPTION}.to_tokens")
    yield Rule("encoder_pooling.0", f"{_CAPTION}.pool.norm")
    yield Rule("encoder_pooling.2", f"{_CAPTION}.to_vector")
    yield Rule("encoder_pooling.3", f"{_CAPTION}.norm_vector")
    yield from _pool_rules(_POOL)
    if "low" in stage.conditioner.embedders:
        yield Rule("aug_proj.0", f"{_LOW}.level.1")
        yield Rule("aug_proj.2", f"{_LOW}.level.3")


def _pool_rules(theirs: str) -> Iterator[Rule]:
    """The attention that pools the caption's states."""
    yield Rule(f"{theirs}positional_embedding", f"{_CAPTION}.pool.query", torch.flatten)
    yield Rule(f"{theirs}q_proj", f"{_CAPTION}.pool.q")
    yield Rule([f"{theirs}k_proj", f"{theirs}v_proj"], f"{_CAPTION}.pool.kv", joined)


def _of_diffusers(folder: Path, number: str, system: str) -> Imported:
    config, net = unet_config(folder)
    wanted = {"I": None, "II": "timestep"}[number]
    found = config.get("class_embed_type"), config.get("addition_embed_type")
    if found != (wanted, "text"):
        raise UserError(f"{folder}/config.json is not of {system}: give the folder of its unet")
    path = first_of(folder, DIFFUSERS, system)
    size = config["encoder_hid_dim"]
    settings = {
        **{f"net.{key}": value for key, value in net.items()},
        **_common(
            number, size, config.get("addition_embed_type_num_heads", 64), config["sample_size"]
        ),
    }
    files = [path, folder / "config.json"]
    tensors = tensors_in(path, system)
    experiment = EXPERIMENTS[number]
    return Imported(experiment, settings, tensors, _diffusers_rules, system, LICENSE, files)


def _diffusers_rules(stage: Any) -> Iterator[Rule]:
    yield from unet_rules(stage.net, "net.")
    yield Rule("encoder_hid_proj", f"{_CAPTION}.to_tokens")
    yield Rule("add_embedding.norm1", f"{_CAPTION}.pool.norm")
    yield Rule("add_embedding.proj", f"{_CAPTION}.to_vector")
    yield Rule("add_embedding.norm2", f"{_CAPTION}.norm_vector")
    yield from _pool_rules("add_embedding.pool.")
    if "low" in stage.conditioner.embedders:
        yield Rule("class_embedding.linear_1", f"{_LOW}.level.1")
        yield Rule("class_embedding.linear_2", f"{_LOW}.level.3")
