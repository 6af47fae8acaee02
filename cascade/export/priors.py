"""The diffusion prior as diffusers' `PriorTransformer`, and a decoder's conditions as
`UnCLIPTextProjModel`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cascade.conditioning import Sequence, Vector
from cascade.export.layouts import Model, check_net, refused

_ENDS = {
    "noise_level.1": "time_embedding.linear_1",
    "noise_level.3": "time_embedding.linear_2",
    "embed_in": "proj_in",
    "norm_out": "norm_out",
    "embed_out": "proj_to_clip_embeddings",
}
_BLOCK = {
    "norm_attention": "norm1",
    "q": "attn1.to_q",
    "out": "attn1.to_out.0",
    "norm_mlp": "norm3",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
}


def prior_model(stage: Any, config: Mapping[str, Any], where: str) -> Model:
    """A prior in diffusers' terms.

    Args:
        config: of the stage.

    Raises:
        UserError: diffusers has no such prior.
    """
    net, caption, clip_text = stage.net, *_embedders(stage, where, "caption", "clip_text")
    check_net(config["net"], "cascade.nets.prior.PriorTransformer", where)
    _check_caption(caption, where, norm=None)
    _check_vector(clip_text, where, "clip_text")
    if clip_text.tokens != 1 or clip_text.dim:
        raise refused(where, "clip_text.tokens", clip_text.tokens, "one token and no vector")
    if caption.size != clip_text.size:
        raise refused(where, "text.size", caption.size, f"as many as embeddings: {clip_text.size}")
    if net.skip is not None and any(p.any() for p in net.skip.parameters()):
        raise refused(where, "net.skip", True, "false")
    if not net.places.fixed:
        raise refused(where, "weights", "of an older version", "newly trained ones")
    z = torch.full((1, stage.codec.size), 3.0)
    if not torch.allclose(stage.codec.decode(z), z * stage.codec.std + stage.codec.mean, atol=1e-6):
        raise refused(where, "stage.codec.unit", True, "raw embeddings: false")
    heads = config["net"]["heads"]
    about = {
        "num_attention_heads": heads,
        "attention_head_dim": net.width // heads,
        "num_layers": config["net"]["layers"],
        "embedding_dim": stage.codec.size,
        "num_embeddings": net.places.context,
        "additional_embeddings": 4,
    }
    return Model("PriorTransformer", about, _prior_state(stage, caption, clip_text))


def _prior_state(stage: Any, caption: Sequence, clip_text: Vector) -> dict[str, Tensor]:
    net, own = stage.net, stage.net.state_dict()
    found = {
        "prd_embedding": own["query"][None, None],
        "positional_embedding": own["positions"][None],
        "clip_mean": stage.codec.mean[None],
        "clip_std": stage.codec.std[None],
    }
    places = list(_ENDS.items())
    for n in range(len(net.blocks)):
        ours, theirs = f"blocks.{n}", f"transformer_blocks.{n}"
        places += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _BLOCK.items()]
        for suffix in ("weight", "bias"):
            k, v = own[f"{ours}.kv.{suffix}"].chunk(2)
            found |= {f"{theirs}.attn1.to_k.{suffix}": k, f"{theirs}.attn1.to_v.{suffix}": v}
    for suffix in ("weight", "bias"):
        found |= {f"{b}.{suffix}": own[f"{a}.{suffix}"] for a, b in places}
        found[f"encoder_hidden_states_proj.{suffix}"] = getattr(caption.to_tokens, suffix)
        found[f"embedding_proj.{suffix}"] = getattr(clip_text.to_tokens, suffix)
    return {key: value.detach().float().clone() for key, value in found.items()}


def text_projection(stage: Any, where: str) -> Model:
    """A decoder's conditions in diffusers' terms. Raises UserError if it has no such ones."""
    names = ("caption", "clip_image", "clip_text")
    caption, image, clip_text = _embedders(stage, where, *names)
    _check_caption(caption, where, norm="after")
    for name, embedder in zip(names[1:], (image, clip_text)):
        _check_vector(embedder, where, name)
    if caption.dim or clip_text.width or not (image.dim and image.width and clip_text.dim):
        raise refused(where, "caption.dim", caption.dim, "vectors of both embeddings alone")
    if caption.size != image.size:
        raise refused(where, "text.size", caption.size, f"as many as embeddings: {image.size}")
    width = image.width
    about = {
        "clip_extra_context_tokens": image.tokens,
        "clip_embeddings_dim": image.size,
        "time_embed_dim": image.dim,
        "cross_attention_dim": width,
    }
    found = {"learned_classifier_free_guidance_embeddings": image.null}
    modules = {
        "embedding_proj": clip_text.to_vector,
        "clip_image_embeddings_project_to_time_embeddings": image.to_vector,
        "encoder_hidden_states_proj": caption.to_tokens,
        "text_encoder_hidden_states_norm": caption.norm,
    }
    for name, module in modules.items():
        found |= {f"{name}.{s}": getattr(module, s) for s in ("weight", "bias")}
    for suffix in ("weight", "bias"):  # our rows are [token, width], theirs [width, token]
        rows = getattr(image.to_tokens, suffix).unflatten(0, (image.tokens, width))
        found[f"clip_extra_context_tokens_proj.{suffix}"] = rows.transpose(0, 1).flatten(0, 1)
    state = {key: value.detach().float().clone() for key, value in found.items()}
    return Model("UnCLIPTextProjModel", about, state)


def _embedders(stage: Any, where: str, *names: str) -> list[Any]:
    """The embedders of these keys. UserError if there are others, or some are missing."""
    own = {embedder.key: embedder for embedder in stage.conditioner.embedders.values()}
    keys = {"caption": "text"}
    wanted = [keys.get(name, name) for name in names]
    if set(own) != set(wanted) or stage.conditioner.sketch is not None:
        found = ", ".join(sorted(own)) + (", sketch" if stage.conditioner.sketch else "")
        raise refused(where, "stage.conditioner.embedders", found, ", ".join(wanted))
    if not stage.conditioner.empty_caption:
        raise refused(where, "stage.conditioner.empty_caption", False, True)
    return [own[key] for key in wanted]


def norm_of(caption: Any) -> str | None:
    """Where the tokens of a caption are normalised, as `Sequence` is told."""
    if caption.norm_before:
        return "before"
    return "after" if hasattr(caption.norm, "weight") else None


def _check_caption(caption: Any, where: str, norm: str | None) -> None:
    if (found := norm_of(caption)) != norm:
        raise refused(where, "embedders.caption.norm", found, norm)


def _check_vector(embedder: Any, where: str, name: str) -> None:
    if embedder.scale != 1:
        raise refused(where, f"embedders.{name}.unit", True, "raw embeddings: false")
