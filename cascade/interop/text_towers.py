"""The text towers of CLIP in transformers' format, as directories that `FrozenCLIP` reads."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from cascade.encoders.sources import CLIP_CONFIG, CLIP_WEIGHTS
from cascade.errors import UserError
from cascade.files.atomic import write_text
from cascade.interop.files import config_in, first_of, tensors_in
from cascade.interop.names.rules import Rule, joined, renamed
from cascade.interop.priors import check_class, check_settings

FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
# Of ViT-L/14; the picture tower is not in these folders, and sampling does not need it.
_VISION = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
_LAYER, _BLOCK = "encoder.layers.N.", "transformer.resblocks.N."
_RULES = [
    Rule("embeddings.token_embedding", "token_embedding"),
    Rule("embeddings.position_embedding.weight", "positional_embedding"),
    Rule("final_layer_norm", "ln_final"),
    Rule("text_projection.weight", "text_projection", torch.t),
    Rule(f"{_LAYER}layer_norm1", f"{_BLOCK}ln_1"),
    Rule(f"{_LAYER}layer_norm2", f"{_BLOCK}ln_2"),
    *(
        Rule(
            [f"{_LAYER}self_attn.{x}_proj.{s}" for x in "qkv"], f"{_BLOCK}attn.in_proj_{s}", joined
        )
        for s in ("weight", "bias")
    ),
    Rule(f"{_LAYER}self_attn.out_proj", f"{_BLOCK}attn.out_proj"),
    Rule(f"{_LAYER}mlp.fc1", f"{_BLOCK}mlp.c_fc"),
    Rule(f"{_LAYER}mlp.fc2", f"{_BLOCK}mlp.c_proj"),
]


def text_tower(source: Path) -> Callable[[Path], None]:
    """Reads a `CLIPTextModelWithProjection`; returns what writes it into a folder.

    Raises:
        UserError: it is another model, or a file is missing or damaged.
    """
    system = "a CLIP's text tower"
    config = config_in(source)
    (name,) = config.get("architectures") or ["model without architectures"]
    check_class({"_class_name": name}, source, "CLIPTextModelWithProjection")
    check_settings(config, source, {"layer_norm_eps": 1e-5})
    if (act := config.get("hidden_act", "quick_gelu")) not in ("quick_gelu", "gelu"):
        raise UserError(
            f"{source}/config.json has hidden_act={act}: only gelu and quick_gelu are read"
        )
    width = config["hidden_size"]
    text = {
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "width": width,
        "heads": config["num_attention_heads"],
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    model = {"embed_dim": config["projection_dim"], "quick_gelu": act == "quick_gelu"}
    about = {"model_cfg": {**model, "vision_cfg": _VISION, "text_cfg": text}}
    path = first_of(source, FILES, system)
    theirs = {k.removeprefix("text_model."): v for k, v in tensors_in(path, system).items()}
    unused = {r"embeddings\.position_ids": "a constant"}
    ours = {k: v.contiguous() for k, v in renamed(theirs, _RULES, path, unused).items()}

    def write(folder: Path) -> None:
        folder.mkdir()
        write_text(folder / CLIP_CONFIG, json.dumps(about, indent=2) + "\n")
        save_file(ours, folder / CLIP_WEIGHTS)

    return write
