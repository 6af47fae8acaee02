"""CLIP's text tower as transformers' `CLIPTextModelWithProjection`."""

from collections.abc import Mapping

from torch import Tensor

from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.sources import clip_source, default_of
from cascade.encoders.text_tower import OPTIONS
from cascade.export.layouts import Model, refused

_START, _END = 49406, 49407
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
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
    state = _renamed(clip.text_state(), sizes["layers"])
    return Model("CLIPTextModelWithProjection", config, state)


def _renamed(own: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
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
                f"{theirs}.{b}.{suffix}": own[f"{ours}.{a}.{suffix}"] for a, b in _BLOCK.items()
            }
            parts = own[f"{ours}.attn.in_proj_{suffix}"].chunk(3)
            for name, part in zip("qkv", parts):
                found[f"{theirs}.self_attn.{name}_proj.{suffix}"] = part
    return {key: value.float().contiguous().clone() for key, value in found.items()}
