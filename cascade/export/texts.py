"""CLIP's text tower, and GLIDE's text transformer with its byte pairs, as transformers has them.

GLIDE's is SigLIP's text tower: no mask, and a projection of the last position's state. GLIDE learns
a padding embedding for each position. The exported tower holds them as extra tokens: position p is
padded with token V + p, where V is the size of the vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.conditioning.captions import last
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.published.byte_pairs import BytePairs
from cascade.encoders.sources import clip_source, default_of
from cascade.encoders.text import TextTransformer
from cascade.encoders.text_tower import OPTIONS
from cascade.export.layouts import Model, refused
from cascade.export.priors import norm_of

_START, _END = 49406, 49407
_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_GLIDE = {
    "norm_attention": "layer_norm1",
    "q": "self_attn.q_proj",
    "out": "self_attn.out_proj",
    "norm_mlp": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def text_model(clip: FrozenCLIP, where: str) -> Model:
    """The text tower of a CLIP. Its embeddings are raw.

    Raises:
        UserError: the embeddings are normalised here, or transformers has no such tower.
    """
    if clip.unit:
        raise refused(where, "clip.unit", True, "raw embeddings: false")
    source = clip_source(clip.name, clip.checkpoint, clip.quick_gelu)
    sizes = default_of("CLIPTextCfg") | source.model["text_cfg"]
    if other := sorted(source.choices["text_cfg"].keys() - OPTIONS):
        raise refused(where, f"text_cfg.{other[0]}", sizes[other[0]], "it to be left out")
    config = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["width"],
        "intermediate_size": int(sizes["width"] * sizes["mlp_ratio"]),
        "projection_dim": source.model["embed_dim"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": sizes["context_length"],
        "hidden_act": "quick_gelu" if source.choices["quick_gelu"] else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": _START,
        "eos_token_id": _END,
        "pad_token_id": _END,
    }
    state = _clip_state(clip.text_state(), sizes["layers"])
    return Model("CLIPTextModelWithProjection", config, state)


def _clip_state(own: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    found = {
        "text_model.embeddings.token_embedding.weight": own["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["positional_embedding"],
        "text_model.final_layer_norm.weight": own["ln_final.weight"],
        "text_model.final_layer_norm.bias": own["ln_final.bias"],
        "text_projection.weight": own["text_projection"].T,
    }
    for n in range(layers):
        ours, theirs = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
        for suffix in ("weight", "bias"):
            found |= {
                f"{theirs}.{b}.{suffix}": own[f"{ours}.{a}.{suffix}"] for a, b in _CLIP.items()
            }
            parts = own[f"{ours}.attn.in_proj_{suffix}"].chunk(3)
            for name, part in zip("qkv", parts):
                found[f"{theirs}.self_attn.{name}_proj.{suffix}"] = part
    return {key: value.float().contiguous().clone() for key, value in found.items()}


def text_transformer(caption: Any, where: str) -> Model:
    """The text transformer of a stage's caption.

    Args:
        caption: its embedder.

    Raises:
        UserError: transformers has no such network.
    """
    encoder = caption.encoder
    if not isinstance(encoder, TextTransformer):
        raise refused(where, "embedders.caption.encoder", None, "a transformer of the stage's own")
    word = encoder.embed.embedding_dim
    settings = (
        ("encoder.near", encoder.near and encoder.near.kernel_size[0], None),
        ("encoder.padded", encoder.padding is not None, True),
        ("encoder.embed", None if word == encoder.width else word, None),
        ("norm", norm_of(caption), None),
        ("project", isinstance(caption.to_tokens, nn.Linear), False),
        ("norm_vector", isinstance(caption.norm_vector, nn.LayerNorm), False),
        ("pool", getattr(caption.pool, "__name__", None), last.__name__),
    )
    for setting, found, needed in settings:
        if found != needed:
            raise refused(where, f"embedders.caption.{setting}", found, needed)
    words, blocks = encoder.embed.weight, encoder.blocks
    config = {
        "model_type": "siglip_text_model",
        "architectures": ["SiglipTextModel"],
        "vocab_size": len(words) + len(encoder.positions),
        "hidden_size": encoder.width,
        "intermediate_size": blocks[0].mlp[0].out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].heads,
        "max_position_embeddings": len(encoder.positions),
        "projection_size": caption.dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return Model("SiglipTextModel", config, _glide_state(caption))


def _glide_state(caption: Any) -> dict[str, Tensor]:
    encoder, own = caption.encoder, caption.encoder.state_dict()
    padding = encoder.padding - encoder.positions
    found = {
        "embeddings.token_embedding.weight": torch.cat([encoder.embed.weight, padding]),
        "embeddings.position_embedding.weight": encoder.positions,
    }
    for s in ("weight", "bias"):
        found[f"final_layer_norm.{s}"] = own[f"norm.{s}"]
        found[f"head.{s}"] = getattr(caption.to_vector, s)
        for n in range(len(encoder.blocks)):
            ours, theirs = f"blocks.{n}", f"encoder.layers.{n}"
            k, v = own[f"{ours}.kv.{s}"].chunk(2)
            found |= {f"{theirs}.{b}.{s}": own[f"{ours}.{a}.{s}"] for a, b in _GLIDE.items()}
            found |= {f"{theirs}.self_attn.{x}_proj.{s}": y for x, y in (("k", k), ("v", v))}
    return {f"text_model.{k}": v.detach().float().contiguous().clone() for k, v in found.items()}


def write_byte_pairs(reader: BytePairs, folder: Path) -> None:
    """Writes the tokenizer as a folder that `PreTrainedTokenizerFast.from_pretrained` reads."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader.tokenizer)
    tokenizer.save_pretrained(folder)
