"""OpenAI's CLIPs as single files: TorchScript archives, and plain state dicts of the same names.

The sizes follow from the shapes of the tensors, but for the heads, which are 64 channels wide in
all that OpenAI published. An archive names its activation; a plain state dict does not show it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade.encoders.published.archive import Archive
from cascade.errors import UserError

_HEAD = 64
_WIDEST = 1024  # of OpenAI's towers; wider CLIPs (LAION's) have other heads
_QUICK = b"1.702"  # QuickGELU's constant, in an archive's code


def sizes_of(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The arguments of `open_clip.CLIP`, without its activation.

    Raises:
        UserError: these are not the weights of a CLIP in OpenAI's layout, or of one with heads of
            an unknown width.
    """
    try:
        vision = _vision(state)
        width = state["ln_final.weight"].shape[0]
        length, embed = state["positional_embedding"].shape[0], state["text_projection"].shape[1]
        vocabulary = state["token_embedding.weight"].shape[0]
        hidden = state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except (KeyError, IndexError):
        raise UserError(
            f"{file} is no CLIP in OpenAI's layout: give the name of its architecture, such as "
            "ViT-L-14, and the file as checkpoint, or a directory with its configuration"
        ) from None
    if max(width, vision["width"]) > _WIDEST:
        raise UserError(
            f"{file} is wider than any CLIP of OpenAI's, and does not show its heads: give the "
            "name of its architecture, such as ViT-H-14, and the file as checkpoint"
        )
    text = {
        "context_length": length,
        "vocab_size": vocabulary,
        "width": width,
        "heads": max(1, width // _HEAD),
        "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
    }
    if hidden != 4 * width:
        text["mlp_ratio"] = hidden / width
    return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text}


def _vision(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
        hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        found = {"image_size": patch * grid, "layers": layers, "width": width, "patch_size": patch}
        found |= {"mlp_ratio": hidden / width} if hidden != 4 * width else {}
        return found | ({"head_width": width} if width < _HEAD else {})
    layers = [_count(state, rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 5)]
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    return {"image_size": 32 * grid, "layers": layers, "width": width}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)


def activation_of(archive: Archive) -> bool | None:
    """Whether an archive's blocks use QuickGELU; None: it does not show its activation."""
    kinds = {
        kind.rpartition(".")[2] for path, kind in archive.types.items() if path.endswith("mlp.gelu")
    }
    if kinds == {"QuickGELU"} or any(_QUICK in text for text in archive.code()):
        return True
    return False if kinds == {"GELU"} else None
