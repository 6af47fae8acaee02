"""GLIDE's base and upsampler, as OpenAI published them (glide-text2im)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.interop.files import first_of, tensors_in
from cascade.interop.imported import Imported
from cascade.interop.names.adm import HEAD_CHANNELS, adm_rules, adm_sizes
from cascade.interop.names.rules import Rule, by_heads, count, split

LICENSE = "MIT (openai/glide-text2im), see its model-card.md"
_BLOCK, _CAPTION = "transformer.resblocks.N.", "conditioner.embedders.caption"
_OURS = f"{_CAPTION}.encoder.blocks.N."


def base(source: Path) -> Imported:
    """Reads the base network from its file, or from the folder that holds it."""
    return _network(source, "base.pt", "GLIDE's base", "glide_base64_released", 0)


def upsampler(source: Path) -> Imported:
    """Reads the upsampler from its file, or from the folder that holds it."""
    return _network(source, "upsample.pt", "GLIDE's upsampler", "glide_sr256_released", 3)


def _network(source: Path, file: str, system: str, experiment: str, pictures: int) -> Imported:
    path = source if source.is_file() else first_of(source, [file], system)
    tensors = tensors_in(path, system)
    sizes = adm_sizes(tensors, path)
    if (found := sizes["image_channels"]) != pictures:
        raise UserError(
            f"{path} reads {3 + found} channels, and {system} reads {3 + pictures} (networks for "
            "inpainting are not imported): give its weights"
        )
    for name in ("token_embedding.weight", "padding_embedding", "transformer_proj.weight"):
        if name not in tensors:
            raise UserError(f"{path} lacks {name}, which {system} has: give its weights")
    vocabulary, width = tensors["token_embedding.weight"].shape
    settings = {
        **{f"net.{key}": value for key, value in sizes.items()},
        "text.size": width,
        "text.reader.length": len(tensors["padding_embedding"]),
        "text.reader.folder": str(path.parent.absolute()),
        "text.encoder.vocabulary": vocabulary,
        "text.encoder.layers": count(tensors, "transformer.resblocks.N"),
        "text.encoder.heads": width // HEAD_CHANNELS,
    }
    return Imported(experiment, settings, tensors, _rules, system, LICENSE, [path])


def _rules(stage: Any) -> Iterator[Rule]:
    encoder = stage.conditioner.embedders["caption"].encoder
    interleaved = by_heads(encoder.blocks[0].heads, 3)
    yield from adm_rules(stage.net, "net.")
    yield Rule("token_embedding", f"{_CAPTION}.encoder.embed")
    yield Rule("positional_embedding", f"{_CAPTION}.encoder.positions")
    yield Rule("padding_embedding", f"{_CAPTION}.encoder.padding")
    yield Rule("final_ln", f"{_CAPTION}.encoder.norm")
    yield Rule("transformer_proj", f"{_CAPTION}.to_vector")
    yield Rule(f"{_BLOCK}ln_1", f"{_OURS}norm_attention")
    yield Rule(f"{_BLOCK}ln_2", f"{_OURS}norm_mlp")
    halves = split(1, 2)
    yield Rule(f"{_BLOCK}attn.c_qkv", [f"{_OURS}q", f"{_OURS}kv"], lambda x: halves(interleaved(x)))
    yield Rule(f"{_BLOCK}attn.c_proj", f"{_OURS}out")
    yield Rule(f"{_BLOCK}mlp.c_fc", f"{_OURS}mlp.0")
    yield Rule(f"{_BLOCK}mlp.c_proj", f"{_OURS}mlp.2")
