"""GPT-2's byte pairs, from its two files: the tokens that GLIDE reads."""

import gzip
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.encoders.identity import Former, OfCaptions, identity
from cascade.encoders.weights import NotHere, weights_hash
from cascade.errors import UserError
from cascade.formats.texts import decoded

FILES = ("encoder.json", "vocab.bpe")  # of GPT-2; glide-text2im holds them with the ending .gz


class BytePairs(OfCaptions):
    """Writes `tokens` [b, length]: lower-cased captions, padded with the last token.

    Unlike CLIP's there is no start or end token, so the empty caption is all padding.

    Args:
        folder: holds encoder.json and vocab.bpe, perhaps as .gz.
        length: context length; longer captions are cut.

    Raises (on first use):
        UserError: a file is missing or damaged.
    """

    writes = frozenset({"tokens"})
    name, sizes = "GPT-2's byte pairs", {}
    former = Former("")

    def __init__(self, folder: str, length: int):
        self.folder, self.length = folder, length

    @cached_property
    def hash(self) -> str:
        """Identifies the vocabulary."""
        return identity(weights_hash(self.files), {"length": self.length})

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`tokens` [b, length]."""
        tokenizer = self.tokenizer
        padding = tokenizer.get_vocab_size() - 1
        rows = torch.full((len(captions), self.length), padding)
        for row, caption in zip(rows, captions):
            found = tokenizer.encode(caption.lower()).ids[: self.length]
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        return {"tokens": rows.to(self.device)}

    @cached_property
    def files(self) -> list[Path]:
        """Its two files. Raises NotHere if one is missing."""
        found = []
        for name in FILES:
            there = [Path(self.folder) / f"{name}{ending}" for ending in ("", ".gz")]
            found += [path for path in there if path.is_file()][:1]
            if not any(path.is_file() for path in there):
                raise NotHere(f"{self.folder} holds no {name} of GPT-2: put it there")
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, without lower-casing and padding."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        files = self.files
        try:
            vocabulary, merges = (_text(path) for path in files)
            pairs = [tuple(line.split()) for line in merges.split("\n")[1:] if line]
            tokenizer = Tokenizer(models.BPE(json.loads(vocabulary), pairs))
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(
                f"{self.folder}: {', '.join(FILES)} are damaged: get them again"
            ) from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer


def _text(path: Path) -> str:
    data = path.read_bytes()
    return decoded(gzip.decompress(data) if path.suffix == ".gz" else data)
