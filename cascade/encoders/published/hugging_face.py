"""CLIPs as transformers saves them: `CLIPModel` in a folder, in open_clip's terms.

`config.json` says the sizes and the activation, and `preprocessor_config.json` how pictures are
normalised. What open_clip's CLIP cannot compute is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.encoders.weights import NotHere, read_json
from cascade.errors import UserError

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PICTURES = ("preprocessor_config.json", "processor_config.json")
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_VOCABULARY, _EPS = 49408, 1e-5
_RENAMED = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"vision_model\.post_layernorm", "visual.ln_post"),
    (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"visual_projection\.weight", "visual.proj"),
    (r"text_projection\.weight", "text_projection"),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
_TURNED = ("visual_projection.weight", "text_projection.weight")
_PARTS = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers of CLIP's kind."""
    file = folder / CONFIG
    return file.is_file() and read_json(file).get("model_type") == "clip"


def weights_in(folder: Path) -> Path:
    """The file of weights. Raises NotHere if it is missing or split into several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    split = any(folder.glob("*.index.json"))
    remedy = "join its shards into one" if split else "put its"
    raise NotHere(f"{folder} is no whole CLIP: {remedy} {WEIGHTS[0]} there")


def model_in(folder: Path) -> dict[str, Any]:
    """The arguments of `open_clip.CLIP`. Raises UserError for what it cannot compute."""
    file = folder / CONFIG
    config = read_json(file)
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    try:
        acts = {_ACTIVATIONS.get(one.get("hidden_act", "quick_gelu")) for one in (text, vision)}
        if len(acts) > 1 or None in acts:
            raise UserError(f"{file} has another hidden_act than gelu or quick_gelu: choose a CLIP")
        if text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
            raise UserError(f"{file} has not CLIP's {_VOCABULARY} tokens: choose another CLIP")
        if any(one.get("layer_norm_eps", _EPS) != _EPS for one in (text, vision)):
            raise UserError(f"{file} has another layer_norm_eps than {_EPS}: choose another CLIP")
        pictures = {
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 32),
        }
        texts = {
            "context_length": text.get("max_position_embeddings", 77),
            "heads": text.get("num_attention_heads", 8),
        }
        return {
            "embed_dim": config.get("projection_dim", 512),
            "vision_cfg": _tower(vision, _VISION) | pictures,
            "text_cfg": _tower(text, _TEXT) | texts,
            "quick_gelu": acts.pop(),
        }
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} is no configuration of a CLIP: fetch it again") from error


# transformers' defaults, which it does not always write down: width, hidden, layers, heads.
_VISION, _TEXT = (768, 3072, 12, 12), (512, 2048, 12, 8)


def _tower(config: Mapping[str, Any], defaults: tuple[int, int, int, int]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    width, hidden, layers, heads = (config.get(n, d) for n, d in zip(names, defaults))
    found = {"width": width, "layers": layers}
    if hidden != 4 * width:
        found["mlp_ratio"] = hidden / width
    if defaults is _VISION and width // heads != 64:
        found["head_width"] = width // heads
    return found


def normalisation_in(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pictures. Raises NotHere if no file says them."""
    for name in _PICTURES:
        if (folder / name).is_file():
            found = read_json(folder / name)
            found = found.get("image_processor", found)
            mean, std = found.get("image_mean"), found.get("image_std")
            if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
                return tuple(map(float, mean)), tuple(map(float, std))
    raise NotHere(
        f"{folder} does not say how its pictures are normalised: put its {_PICTURES[0]} there"
    )


def is_state(state: Mapping[str, Any]) -> bool:
    """Whether weights have transformers' names."""
    return "text_model.embeddings.token_embedding.weight" in state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by open_clip's names."""
    found: dict[str, Tensor] = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):  # a constant
            continue
        if key in _TURNED:
            value = value.T.contiguous()
        if part := _PARTS.fullmatch(key):
            joint.setdefault(f"{part[1]}.attn.in_proj_{part[3]}", {})[part[2]] = value
        else:
            found[_renamed(key)] = value
    for key, parts in joint.items():
        found[_renamed(key)] = torch.cat([parts[name] for name in sorted(parts, key="qkv".index)])
    return found


def _renamed(key: str) -> str:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key
