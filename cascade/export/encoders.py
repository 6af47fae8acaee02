"""Frozen encoders as folders of their own, which say all that their output depends on."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.llm import FrozenLLM
from cascade.encoders.published.byte_pairs import BytePairs
from cascade.encoders.published.language_models import CONFIG, INDEX, TOKENIZER, files_of
from cascade.encoders.published.state import clip_state
from cascade.encoders.sources import CLIP_CONFIG, CLIP_WEIGHTS, clip_source
from cascade.encoders.t5 import t5_source
from cascade.encoders.text import FrozenT5
from cascade.encoders.weights import tensors_of
from cascade.latents.frozen import FrozenAutoencoder

Place = tuple[str, str | None]  # a name or path, and a checkpoint
_T5_FILES = (
    *("config.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)


def kind_of(encoder: Any) -> str | None:
    """What the folder of an encoder is called; None: it has no files, as CLIP's tokenizer."""
    kinds = {FrozenCLIP: "clip", FrozenT5: "t5", FrozenLLM: "llm", BytePairs: "byte_pairs"}
    kinds |= {FrozenAutoencoder: "autoencoder"}
    return kinds.get(type(encoder))


def place_of(encoder: Any) -> Place:
    """What names an encoder's files in a configuration."""
    if isinstance(encoder, BytePairs):
        return encoder.folder, None
    return encoder.name, getattr(encoder, "checkpoint", None)


def write_encoder(encoder: Any, folder: Path) -> None:
    """Writes the folder of an encoder, from which it loads without any other setting.

    Raises:
        UserError: its files are not on this machine, or cannot be read.
    """
    folder.mkdir()
    if isinstance(encoder, FrozenCLIP):
        _write_clip(encoder, folder)
        return
    if isinstance(encoder, BytePairs):
        files = encoder.files
    elif isinstance(encoder, FrozenAutoencoder):
        files = [encoder.source.config, encoder.source.weights]
    elif isinstance(encoder, FrozenLLM):
        own = files_of(Path(encoder.name))
        present = [f for name in (CONFIG, TOKENIZER, INDEX) if (f := own.folder / name).exists()]
        files = [*present, *own.weights]
    else:
        source = t5_source(encoder.name)
        present = [f for name in _T5_FILES if (f := source.directory / name).exists()]
        files = [*present, *source.weights]
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _write_clip(encoder: FrozenCLIP, folder: Path) -> None:
    source = clip_source(encoder.name, encoder.checkpoint, encoder.quick_gelu)
    config = {
        "model_cfg": source.model,
        "preprocess_cfg": {"mean": list(source.mean), "std": list(source.std)},
    }
    (folder / CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    state, own = encoder.text_state(), set()
    if source.weights.suffix == ".safetensors":
        own = tensors_of([source.weights]).keys()
    if own != state.keys():  # it is not a text tower alone, as some imported CLIPs are
        state = clip_state(source, encoder.name)
    if own == state.keys():
        # The same bytes, and so the same hash.
        shutil.copyfile(source.weights, folder / CLIP_WEIGHTS)
    else:
        state = {key: value.contiguous() for key, value in state.items()}
        save_file(state, folder / CLIP_WEIGHTS, {"format": "pt"})
