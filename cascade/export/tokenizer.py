"""CLIP's tokenizer in the format of transformers, made from the vocabulary that open_clip has."""

import gzip
from pathlib import Path
from typing import Any

from cascade.encoders.sources import module_file

START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # the vocabulary without bytes and special tokens; the file has more


def clip_tokenizer(length: int) -> Any:
    """transformers' `CLIPTokenizer` with the same tokens as `cascade.encoders.text.tokenize`.

    (open_clip also repairs texts first, by ftfy: it makes typographic quotes straight, say.)
    It pads with end-of-text, so that no word is special, as "!" is where token 0 pads.

    Args:
        length: the context length.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=length,
    )


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    file = module_file("tokenizer").with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        lines = opened.read().split("\n")[1 : 1 + _MERGES]
    merges = [tuple(line.split()) for line in lines]
    letters = _letters()
    words = [*letters, *(f"{x}</w>" for x in letters), *map("".join, merges), START, END]
    return {word: i for i, word in enumerate(words)}, merges


def _letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def write_tokenizer(folder: Path, length: int) -> None:
    """Writes it as a folder that `CLIPTokenizer.from_pretrained` reads."""
    clip_tokenizer(length).save_pretrained(folder)
