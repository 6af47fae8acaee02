"""The diffusion priors of Karlo and Kandinsky, as published and in diffusers' format.

Both are unCLIP's network over raw CLIP embeddings, scaled by their mean and deviation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.interop.files import DIFFUSERS, config_in, first_of, statistics, tensors_in
from cascade.interop.imported import Imported
from cascade.interop.names.rules import Rule, by_heads, count, joined, split

HEAD_CHANNELS = 64  # of every published prior; no file of the originals tells
STATISTICS = "ViT-L-14_stats.th"
EXPERIMENT = "karlo_prior_released"

_CAPTION = "conditioner.embedders.caption.to_tokens"
_CLIP_TEXT = "conditioner.embedders.clip_text.to_tokens"
_OURS = "net.blocks.N."


def _original(stage: Any) -> list[Rule]:
    """The names of Karlo's authors, whose queries, keys and values are interleaved by head."""
    interleaved, block = by_heads(stage.net.blocks[0].heads, 3), "transformer.resblocks.N."

    def rows(x: Tensor) -> tuple[Tensor, ...]:
        return split(1, 2)(interleaved(x))

    return [
        Rule("time_embed.0", "net.noise_level.1"),
        Rule("time_embed.2", "net.noise_level.3"),
        Rule("clip_img_proj", "net.embed_in"),
        Rule("out_proj", "net.embed_out"),
        Rule("final_ln", "net.norm_out"),
        Rule("prd_emb", "net.query", torch.flatten),
        Rule("positional_embedding", "net.positions", lambda x: x[0]),
        Rule("text_enc_proj", _CAPTION),
        Rule("text_emb_proj", _CLIP_TEXT),
        Rule(f"{block}ln_1", f"{_OURS}norm_attention"),
        Rule(f"{block}ln_2", f"{_OURS}norm_mlp"),
        Rule(f"{block}attn.c_qkv", [f"{_OURS}q", f"{_OURS}kv"], rows),
        Rule(f"{block}attn.c_proj", f"{_OURS}out"),
        Rule(f"{block}mlp.c_fc", f"{_OURS}mlp.0"),
        Rule(f"{block}mlp.c_proj", f"{_OURS}mlp.2"),
    ]


_BLOCK = "transformer_blocks.N."
_DIFFUSERS = [
    Rule("time_embedding.linear_1", "net.noise_level.1"),
    Rule("time_embedding.linear_2", "net.noise_level.3"),
    Rule("proj_in", "net.embed_in"),
    Rule("proj_to_clip_embeddings", "net.embed_out"),
    Rule("norm_out", "net.norm_out"),
    Rule("prd_embedding", "net.query", torch.flatten),
    Rule("positional_embedding", "net.positions", lambda x: x[0]),
    Rule("encoder_hidden_states_proj", _CAPTION),
    Rule("embedding_proj", _CLIP_TEXT),
    Rule("clip_mean", "codec.mean", torch.flatten),
    Rule("clip_std", "codec.std", torch.flatten),
    Rule(f"{_BLOCK}norm1", f"{_OURS}norm_attention"),
    Rule(f"{_BLOCK}norm3", f"{_OURS}norm_mlp"),
    Rule(f"{_BLOCK}attn1.to_q", f"{_OURS}q"),
    Rule([f"{_BLOCK}attn1.to_k", f"{_BLOCK}attn1.to_v"], f"{_OURS}kv", joined),
    Rule(f"{_BLOCK}attn1.to_out.0", f"{_OURS}out"),
    Rule(f"{_BLOCK}ff.net.0.proj", f"{_OURS}mlp.0"),
    Rule(f"{_BLOCK}ff.net.2", f"{_OURS}mlp.2"),
]
# What a configuration of diffusers must say for our network to be the same one.
_REPRESENTABLE = {
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_act_fn": "silu",
    "additional_embeddings": 4,
}


def published(source: Path, file: str, system: str, license: str) -> Imported:
    """Reads a prior in the format of Karlo's authors, which Kandinsky 2.1 shares.

    Args:
        source: the checkpoint, or its folder, in which the statistics lie as well.
        file: the checkpoint's published name.

    Raises:
        UserError: a file is missing or damaged, or is not of a prior.
    """
    path = source if source.is_file() else first_of(source, [file], system)
    where = path.parent / STATISTICS
    if not where.is_file():
        raise UserError(f"{where} is missing, without which {path.name} has no scale: put it there")
    mean, std = statistics(where, system)
    tensors = {k.removeprefix("model."): v for k, v in tensors_in(path, system).items()}
    parts = ("positional_embedding", "clip_img_proj.weight", "text_enc_proj.weight")
    sizes = _sizes(tensors, path, *parts)
    if not len(mean) == len(std) == sizes["clip.model.dim"]:
        raise UserError(
            f"{where} is for {len(mean)} numbers, {path.name} for {sizes['clip.model.dim']}: give "
            "the files that belong together"
        )
    heads = {"net.heads": sizes["net.width"] // HEAD_CHANNELS}
    layers = {"net.layers": count(tensors, "transformer.resblocks.N")}
    return Imported(
        EXPERIMENT,
        {**sizes, **heads, **layers},
        tensors,
        _original,
        system,
        license,
        files=[path, where],
        constants={"codec.mean": mean, "codec.std": std},
    )


def of_diffusers(source: Path, system: str, license: str) -> Imported:
    """Reads a `PriorTransformer` of diffusers.

    Raises:
        UserError: our network cannot represent it, or a file is missing or damaged.
    """
    config = config_in(source)
    check_class(config, source, "PriorTransformer")
    check_settings(config, source, _REPRESENTABLE)
    path = first_of(source, DIFFUSERS, system)
    tensors = tensors_in(path, system)
    parts = ("positional_embedding", "proj_in.weight", "encoder_hidden_states_proj.weight")
    sizes = _sizes(tensors, path, *parts)
    heads = {"net.heads": config.get("num_attention_heads", 32)}
    layers = {"net.layers": count(tensors, "transformer_blocks.N")}
    files = [path, source / "config.json"]
    settings = {**sizes, **heads, **layers}
    return Imported(EXPERIMENT, settings, tensors, lambda stage: _DIFFUSERS, system, license, files)


def check_class(config: Mapping[str, Any], source: Path, *known: str) -> None:
    """Raises UserError if the configuration is of another class of diffusers'."""
    if (found := config.get("_class_name")) not in known:
        raise UserError(
            f"{source}/config.json is of a {found}, not of a {' or '.join(known)}: give the folder "
            "of that part"
        )


def check_settings(config: Mapping[str, Any], source: Path, needed: Mapping[str, Any]) -> None:
    """Raises UserError if the configuration has another value than the one that is needed."""
    for key, wanted in needed.items():
        if (found := config.get(key, wanted)) != wanted:
            raise UserError(
                f"{source}/config.json has {key}={found}; only {wanted} can be imported"
            )


def _sizes(
    tensors: Mapping[str, Tensor], path: Path, positions: str, first: str, text: str
) -> dict[str, Any]:
    for name in (positions, first, text):
        if name not in tensors:
            raise UserError(f"{path} lacks {name}, which a diffusion prior has: give its weights")
    width, size = tensors[first].shape
    return {
        "clip.model.dim": size,
        "text.size": tensors[text].shape[1],
        "net.width": width,
        "net.context": tensors[positions].shape[1] - 4,
    }
