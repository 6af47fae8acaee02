"""Textual inversion (2208.01618): learns the embedding of a new word; the token table stays frozen.

A stage reads captions with a text transformer of its own, with a frozen CLIP, or with both. The
word has one row for each of their tables, by the batch key that the table serves (`tokens` or
`text`).
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.adapters.adapter import base_hash, check_base, read
from cascade.conditioning import Sequence as Captions
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import identity
from cascade.encoders.text import TextTransformer, Tokenizer, token_of
from cascade.encoders.weights import tensors_hash
from cascade.errors import UserError
from cascade.files.atomic import write_atomically
from cascade.nets.layers import altered

WORD = "word.safetensors"
Rows = Mapping[str, Tensor]  # a word's row [w] by the batch key that is computed from its table


class Extended(nn.Module):
    """A table of embeddings with one more row, whose token is negative.

    Args:
        row: is a parameter elsewhere, or constant.
        token: of the row.
    """

    def __init__(self, table: Any, row: Float[Tensor, " w"], token: int = -1):
        super().__init__()
        self.table, self.row, self.token = table, (row,), token  # not registered here

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    def forward(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b n w"]:
        new = tokens == self.token
        if not new.any():
            return self.table(tokens)
        return torch.where(new[..., None], self.row[0], self.table(tokens.masked_fill(new, 0)))


class Word(nn.Module):
    """The one trained row of each table that a stage reads captions with.

    Args:
        word: as captions write it.
        like: a word whose rows it begins with.

    Raises:
        UserError: `word` is one already, or `like` is none.
    """

    def __init__(self, word: str, like: str):
        super().__init__()
        self.word, self.like = check_word(word), like
        if token_of(like) is None:
            raise UserError(f"--word {like}: CLIP reads it as several tokens: give another word")
        self.rows = nn.ParameterDict()

    def attached(self, stage: Any) -> "Word":
        """Gives the stage a copy of its encoders that know the word. UserError as `tables`."""
        for key, table in tables(stage):
            row = table(torch.tensor([[token_of(self.like)]], device=stage.device))[0, 0]
            self.rows[key] = nn.Parameter(row.detach().clone())
        teach(stage, self.word, dict(self.rows.items()))
        return self

    def export(self, stage: Any, state: Mapping[str, Tensor], run: Path) -> None:
        """Writes the rows; the file names the word and the network."""
        prefix = "adapter.rows."
        rows = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        encoders = [encoder.hash for encoder in stage.encoders]
        about = {"word": self.word, "base": base_hash(state), "encoders": json.dumps(encoders)}
        write_atomically(run / WORD, lambda path: save_file(rows, path, about))


def check_word(word: str) -> str:
    """Raises UserError if a word cannot be told from those that a model knows."""
    if not word.strip() or word != " ".join(word.split()) or len(word) > 100:
        raise UserError(
            f"--token {word!r}: give a word such as '<thing>', without spaces around it"
        )
    if token_of(word) is not None:
        raise UserError(f"--token {word}: that is a word already: give one such as '<{word}>'")
    return word


def tables(stage: Any) -> Iterator[tuple[str, Any]]:
    """The tables of tokens by which a stage reads captions, by batch key.

    Raises:
        UserError: it reads none, or by an encoder whose table cannot be extended.
    """
    found: dict[str, Any] = {}
    for embedder in stage.conditioner.embedders.values():
        if isinstance(embedder, Captions) and isinstance(embedder.encoder, TextTransformer):
            found["tokens"] = embedder.encoder.embed
    for encoder in stage.encoders:
        if isinstance(encoder, FrozenCLIP):
            found["text"] = encoder.table
        elif not isinstance(encoder, Tokenizer):
            raise UserError(
                f"{stage.writes}: {encoder.name} is no CLIP, so it learns no word: choose "
                "--method dreambooth or lora"
            )
    if not found:
        raise UserError(f"{stage.writes}: the stage reads no captions")
    return iter(found.items())


def teach(stage: Any, word: str, rows: Rows) -> None:
    """Replaces the parts of a stage that read captions by copies that know a word.

    Args:
        rows: by the keys of `tables`.
    """
    embedders = stage.conditioner.embedders
    changed = {}
    for name, embedder in embedders.items():
        if isinstance(embedder, Captions) and isinstance(embedder.encoder, TextTransformer):
            token = -1 - len(_words(stage.encoders))
            own = altered(
                embedder.encoder, embed=Extended(embedder.encoder.embed, rows["tokens"], token)
            )
            changed[name] = altered(embedder, encoder=own)
    if changed:
        others = altered(embedders)
        for name, embedder in changed.items():
            others[name] = embedder
        stage.conditioner = altered(stage.conditioner, embedders=others)
    stage.encoders = tuple(_taught(encoder, word, rows) for encoder in stage.encoders)


def _words(encoders: Sequence[Any]) -> tuple[str, ...]:
    return next((encoder.words for encoder in encoders if hasattr(encoder, "words")), ())


def _taught(encoder: Any, word: str, rows: Rows) -> Any:
    """A copy of an encoder that knows a further word."""
    if isinstance(encoder, FrozenCLIP):
        token = -1 - len(encoder.words)
        return encoder.taught(word, lambda table: Extended(table, rows["text"], token))
    other = copy.copy(encoder)
    other.words = (*encoder.words, word)
    return other


def learned(stage: Any, folders: Sequence[Path]) -> Any:
    """A stage that knows the words of runs; it shares all weights with the given one.

    Raises:
        UserError: a run learned no word, or one of another network, or a known one.
    """
    state, stage = stage.state_dict(), stage.altered()
    for folder in folders:
        rows, about = read(folder / WORD)
        check_base(folder, about, state)
        word, wanted = about.get("word", ""), dict(tables(stage))
        if rows.keys() != wanted.keys() or not word:
            raise UserError(
                f"{folder} holds rows for {sorted(rows)}, not {sorted(wanted)}: give its own"
            )
        if word.lower() in map(str.lower, _words(stage.encoders)):
            raise UserError(f"{folder}: {word} is the word of another run, too: leave one out")
        teach(stage, word, {key: row.to(stage.device) for key, row in rows.items()})
        for encoder in stage.encoders:
            encoder.hash = identity(tensors_hash(rows), {"word": word, "of": encoder.hash})
    return stage
