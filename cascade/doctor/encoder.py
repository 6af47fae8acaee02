"""Check a CLIP, a T5 or another language model in a folder: whether it loads, and what its hash is.

Of a CLIP and a T5, only the headers of safetensors are read, until the hash is computed.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from cascade.doctor.finding import Budget, Finding, note
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.llm import FrozenLLM
from cascade.encoders.published import hugging_face
from cascade.encoders.published.language_models import files_of, is_language_model, network_of
from cascade.encoders.published.state import clip_state
from cascade.encoders.sources import CLIP_CONFIG, clip_source
from cascade.encoders.t5 import check_t5, t5_source, t5_tokenizer
from cascade.encoders.text import FrozenT5


def encoder(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Check a folder in open_clip's format, or else in that of transformers.

    Args:
        budget: for reading whole files.

    Raises:
        UserError: the encoder cannot be loaded.
    """
    check, files = t5, "files"
    if _is_clip(folder):
        check, files = clip, "weights"
    elif is_language_model(folder):
        check = language_model
    try:
        yield from check(folder, budget)
    except TimeoutError:
        yield note(f"not all of its {files} were read, as they are large: ask again with --full")


def _is_clip(folder: Path) -> bool:
    return (folder / CLIP_CONFIG).exists() or hugging_face.is_folder(folder)


def clip(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Check a CLIP in open_clip's format."""
    source = clip_source(str(folder))
    budget.within(lambda: clip_state(source, folder.name, shapes=True))
    about, activation = source.model, "QuickGELU" if source.choices["quick_gelu"] else "GELU"
    side = about["vision_cfg"]["image_size"]
    yield note(
        f"a CLIP with {activation}, pictures of {side} px and embeddings of "
        f"{about['embed_dim']} numbers; its weights fit"
    )
    yield note(f"hash {budget.within(lambda: FrozenCLIP(str(folder)).hash)}")


def t5(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Check a T5 in transformers' format."""
    source = t5_source(str(folder))
    budget.within(lambda: check_t5(source, folder.name))
    budget.within(lambda: t5_tokenizer(folder))
    encoder = FrozenT5(str(folder))
    yield note(f"a T5 with states of {encoder.width} numbers; its weights and tokenizer fit")
    yield note(f"hash {budget.within(lambda: encoder.hash)}")


def language_model(folder: Path, budget: Budget) -> Iterator[Finding]:
    """Check any other language model in transformers' format."""
    encoder, files = FrozenLLM(str(folder)), files_of(folder)
    width, count = encoder.sizes["text"], encoder.parameters
    budget.within(lambda: encoder.tokenized(["a"]))
    yield note(f"a language model with states of {width} numbers and {count:,} parameters")
    budget.within(lambda: network_of(files, torch.bfloat16))
    yield note(f"hash {budget.within(lambda: encoder.hash)}; its weights and tokenizer fit")
