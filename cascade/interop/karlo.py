"""Karlo's decoder and super-resolution, as their authors publish them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade.errors import UserError
from cascade.interop.diffusers_unets import unet_config
from cascade.interop.files import DIFFUSERS, first_of, tensors_in
from cascade.interop.imported import Imported
from cascade.interop.names.adm import adm_rules, adm_sizes
from cascade.interop.names.diffusers import unet_rules
from cascade.interop.names.rules import Rule

LICENSE = "CreativeML Open RAIL-M (LICENSE of kakaobrain/karlo)"
PRIOR = "prior-ckpt-step=01000000-of-01000000.ckpt"
DECODER = "decoder-ckpt-step=01000000-of-01000000.ckpt"
SR = "improved-sr-ckpt-step=1.2M.ckpt"
EMBEDDERS = "conditioner.embedders"
ENLARGED = 4  # times, by the super-resolution
_SR = {"net.net.": "model_first_steps.", "net.last.": "model_last_step."}


def decoder(source: Path) -> Imported:
    """Reads the decoder from its checkpoint, or from the folder that holds it."""
    system = "Karlo's decoder"
    path = source if source.is_file() else first_of(source, [DECODER], system)
    tensors = {k.removeprefix("model."): v for k, v in tensors_in(path, system).items()}
    sizes = adm_sizes(tensors, path)
    for name in ("clip_emb.weight", "text_seq_proj.0.weight"):
        if name not in tensors:
            raise UserError(f"{path} lacks {name}, which {system} has: give its weights")
    settings = {
        **{f"net.{key}": value for key, value in sizes.items()},
        "clip.model.dim": tensors["clip_emb.weight"].shape[1],
        "text.size": tensors["text_seq_proj.0.weight"].shape[1],
    }
    return Imported("karlo_decoder_released", settings, tensors, _decoder, system, LICENSE, [path])


def _decoder(stage: Any) -> Iterator[Rule]:
    image = stage.conditioner.embedders["clip_image"]
    yield from adm_rules(stage.net, "net.")
    yield Rule("clip_emb", f"{EMBEDDERS}.clip_image.to_vector")
    yield Rule("cf_param", f"{EMBEDDERS}.clip_image.null")
    yield Rule("clip_tok_proj", f"{EMBEDDERS}.clip_image.to_tokens", by_token(image.tokens))
    yield Rule("text_seq_proj.0", f"{EMBEDDERS}.caption.to_tokens")
    yield Rule("text_seq_proj.1", f"{EMBEDDERS}.caption.norm")
    yield Rule("text_feat_proj", f"{EMBEDDERS}.clip_text.to_vector")


def decoder_of_diffusers(decoder: Path, projection: Path) -> Imported:
    """Reads the decoder from the folders of its network and of its `UnCLIPTextProjModel`."""
    config, net = unet_config(decoder)
    files = [first_of(folder, DIFFUSERS, "Karlo's decoder") for folder in (decoder, projection)]
    tensors = tensors_in(files[0], "Karlo's decoder")
    more = tensors_in(files[1], "Karlo's decoder")
    if (found := config.get("class_embed_type")) != "identity" or not net["width"]:
        raise UserError(f"{decoder}/config.json has class_embed_type={found}: it is no Karlo's")
    if "embedding_proj.weight" not in more:
        raise UserError(f"{files[1]} lacks embedding_proj.weight: give Karlo's text_proj")
    size = more["embedding_proj.weight"].shape[1]
    settings = {
        **{f"net.{key}": value for key, value in net.items()},
        "size": config["sample_size"],
        "clip.model.dim": size,
        "text.size": more["encoder_hidden_states_proj.weight"].shape[1],
    }
    tensors |= {f"text_proj.{name}": x for name, x in more.items()}
    rules, experiment = _decoder_of_diffusers, "karlo_decoder_released"
    return Imported(experiment, settings, tensors, rules, "Karlo's decoder", LICENSE, files)


def _decoder_of_diffusers(stage: Any) -> Iterator[Rule]:
    image, of = stage.conditioner.embedders["clip_image"], f"{EMBEDDERS}.clip_image"
    text = "text_proj."
    yield from unet_rules(stage.net, "net.")
    yield Rule(f"{text}clip_image_embeddings_project_to_time_embeddings", f"{of}.to_vector")
    yield Rule(f"{text}learned_classifier_free_guidance_embeddings", f"{of}.null")
    yield Rule(f"{text}clip_extra_context_tokens_proj", f"{of}.to_tokens", by_token(image.tokens))
    yield Rule(f"{text}encoder_hidden_states_proj", f"{EMBEDDERS}.caption.to_tokens")
    yield Rule(f"{text}text_encoder_hidden_states_norm", f"{EMBEDDERS}.caption.norm")
    yield Rule(f"{text}embedding_proj", f"{EMBEDDERS}.clip_text.to_vector")


def by_token(tokens: int) -> Any:
    """Reorders the rows of a projection to tokens, from [width, token] to [token, width]."""

    def change(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, tokens)).transpose(0, 1).flatten(0, 1)

    return change


def sr(source: Path) -> Imported:
    """Reads the two networks of the super-resolution from 64 to 256 px."""
    system = "Karlo's super-resolution"
    path = source if source.is_file() else first_of(source, [SR], system)
    tensors = tensors_in(path, system)
    found = []
    for prefix in _SR.values():
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if not part:
            raise UserError(f"{path} has no network {prefix[:-1]}: give {system}'s weights")
        found.append(adm_sizes(part, path))
    first, last = found
    if first != last:
        raise UserError(f"{path}: its two networks differ in size, which {system}'s do not")
    settings = {f"net.net.{key}": value for key, value in first.items()}
    return Imported("karlo_sr256_released", settings, tensors, _sr, system, LICENSE, [path])


def sr_of_diffusers(first: Path, last: Path) -> Imported:
    """Reads the super-resolution from the folders of its two `UNet2DModel`."""
    system = "Karlo's super-resolution"
    (config, net), (_, other) = unet_config(first), unet_config(last)
    if net != other:
        raise UserError(f"{first} and {last} differ in size, which {system}'s networks do not")
    files = [first_of(folder, DIFFUSERS, system) for folder in (first, last)]
    tensors = {
        f"{prefix}{name}": x
        for prefix, file in zip(_SR.values(), files)
        for name, x in tensors_in(file, system).items()
    }
    settings = {f"net.net.{key}": value for key, value in net.items()}
    settings |= {"size": config["sample_size"], "low": config["sample_size"] // ENLARGED}
    return Imported(
        "karlo_sr256_released", settings, tensors, _sr_of_diffusers, system, LICENSE, files
    )


def _sr_of_diffusers(stage: Any) -> Iterator[Rule]:
    for ours, theirs in _SR.items():
        yield from unet_rules(stage.net.net, ours, theirs)


def _sr(stage: Any) -> Iterator[Rule]:
    for ours, theirs in _SR.items():
        yield from adm_rules(stage.net.net, ours, theirs)
