"""Text encoders: each reads `caption` from a batch, and adds its tokens or states.

Nothing is fetched: a model is a local directory, or a name in the local cache. Frozen encoders are
plain objects rather than modules, so that no state dict, optimizer or average holds them, and they
load on first use. Tokens are open_clip's, [b, n], zero-padded after the end-of-text token.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cascade.encoders.identity import Former, OfCaptions, identity
from cascade.encoders.sources import module_file
from cascade.encoders.t5 import (
    T5Source,
    t5_network,
    t5_parameters,
    t5_source,
    t5_tokenizer,
    t5_width,
)
from cascade.encoders.weights import NotHere, weights_hash
from cascade.nets.attention import TransformerBlock
from cascade.nets.layers import run

# The longest entry of CLIP's vocabulary: n tokens cannot cover more characters than n times this.
_LONGEST_TOKEN = 32


def tokenize(
    captions: Sequence[str], length: int, words: Sequence[str] = ()
) -> Int64[Tensor, "b {length}"]:
    """CLIP's byte-pair tokens: start of text, the caption, end of text, zeros.

    A caption that is too long is cut, and still ends with end-of-text. An empty caption is two
    tokens. (Merging a word takes time quadratic in its length, so the part that cannot fit is cut
    first.)

    Args:
        words: further words, in any case; their tokens are -1, -2, ..., so that end-of-text remains
            the greatest number.
    """
    short = [" ".join(caption.split())[: _LONGEST_TOKEN * length] for caption in captions]
    found = _tokenizer().tokenize(short, length)
    if words:
        for row, caption in zip(found, short):
            if new := _with_words(caption, words):
                whole = [*[int(row[0]), *new][: length - 1], int(row.max())]
                row[:] = F.pad(torch.tensor(whole), (0, length - len(whole)))
    return found


def _with_words(caption: str, words: Sequence[str]) -> list[int] | None:
    """The tokens between start and end of a caption that has some of `words`; None if it has none.

    A word begins and ends where other letters do not go on.
    """
    bounds = [
        (r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else "")
        for word in words
    ]
    parts = [f"({a}{re.escape(word)}{b})" for word, (a, b) in zip(words, bounds)]
    tokens: list[int] = []
    start, found = 0, False
    for match in re.finditer("|".join(parts), caption, re.IGNORECASE):
        tokens += [*_tokens(caption[start : match.start()]), -match.lastindex]
        start, found = match.end(), True
    return [*tokens, *_tokens(caption[start:])] if found else None


def _tokens(text: str) -> list[int]:
    return _tokenizer()._tokenizer.encode(text)


def token_of(word: str) -> int | None:
    """The token of a word of CLIP's vocabulary; None if it is read as several tokens."""
    found = _tokens(word)
    return found[0] if len(found) == 1 else None


def exceeds(caption: str, length: int) -> bool:
    """Whether `tokenize` would cut a caption."""
    return bool(tokenize([caption], length + 1)[0, -1])


@cache
def _tokenizer() -> ModuleType:
    """open_clip's module, loaded without the rest of open_clip, whose import takes seconds."""
    spec = spec_from_file_location("open_clip_tokenizer", module_file("tokenizer"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def token_mask(tokens: Int64[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """True up to and including end-of-text, the token with the greatest number.

    Zeros would not do: zero is the padding, but also the first entry of the vocabulary ("!").
    """
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(1, keepdim=True)


def ids(captions: Sequence[str], length: int, words: Sequence[str] = ()) -> list[list[int]]:
    """The tokens of each caption, from start to end of text."""
    tokens = tokenize(captions, length, words)
    return [row[own].tolist() for row, own in zip(tokens, token_mask(tokens))]


def trimmed(tokens: Int64[Tensor, "b n"]) -> Int64[Tensor, "b m"]:
    """Drops the columns that are padding in every row, which need not be computed."""
    return tokens[:, : int(token_mask(tokens).sum(1).max())]


class Tokenizer(OfCaptions):
    """The encoder of a stage that trains its own text transformer: writes `tokens`.

    Args:
        length: context length, with start and end.
    """

    writes = frozenset({"tokens"})

    name, hash, sizes = "CLIP's tokens", "", {}  # there is one vocabulary, and no weights
    former = Former("")
    words: tuple[str, ...] = ()  # learned beside the vocabulary (`adapters.words`)

    def __init__(self, length: int):
        self.length = length

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`tokens` [b, n], padded to the longest caption."""
        return {"tokens": trimmed(tokenize(captions, self.length, self.words)).to(self.device)}

    def tokenized(self, captions: Sequence[str]) -> list[list[int]]:
        return ids(captions, self.length, self.words)


class _Near(nn.Conv1d):
    """Sums each state with its neighbours, channel by channel; padding counts as zero."""

    def __init__(self, width: int, size: int):
        super().__init__(width, width, size, padding="same", groups=width, bias=False)
        nn.init.normal_(self.weight, std=0.3)  # zeros need 1.3 to 1.5 times the pictures

    def forward(
        self, x: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n w"]:
        return super().forward((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)


class TextTransformer(nn.Module):
    """A transformer over the caption's tokens, trained with its stage (GLIDE, section 2.1).

    Every token attends to every other token, but not to padding. The state of the last token,
    end-of-text, can serve as the caption's vector.

    Args:
        width, layers, heads: sizes of the transformer.
        length: context length, with start and end tokens.
        embed: size of the token embeddings, which are then projected to `width` (ALBERT,
            1909.11942); in a small stage, a full table would hold most of the parameters. None:
            `width`.
        vocabulary: number of tokens (default: CLIP's).
        padded: every token attends to padding as well, which has a learned state at each position
            (GLIDE's code): captions are padded to `length` with the last token of the vocabulary.
        checkpoint: store only the inputs of blocks, and recompute them in the backward pass.
        near: how many neighbouring words, itself among them, each word is summed with first, every
            channel with its own weights (a depthwise convolution, as on Primer's queries, keys and
            values, 2109.08668). A word then knows its neighbours from the first step on, which
            attention learns late. None: no words are summed.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        length: int,
        embed: int | None = None,
        vocabulary: int = 49408,
        padded: bool = False,
        checkpoint: bool = False,
        near: int | None = None,
    ):
        super().__init__()
        self.width, self.checkpoint = width, checkpoint
        # Positions are half as large as words. With the usual deviation of 0.02, meaning that
        # depends on word order ("above") is not learned within minutes of training.
        self.embed = nn.Embedding(vocabulary, embed or width)
        self.project = nn.Linear(embed, width, bias=False) if embed else nn.Identity()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.5)
        self.padding = nn.Parameter(torch.randn(length, width)) if padded else None
        self.near = _Near(width, near) if near else None
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Int64[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        """The states [b, n, w] and their mask [b, n]."""
        x = self.project(self.embed(tokens)) + self.positions[: tokens.shape[1]]
        if self.padding is None:
            mask = token_mask(tokens)
        else:
            mask = torch.ones_like(tokens, dtype=torch.bool)
            is_word = tokens != self.embed.num_embeddings - 1
            x = torch.where(is_word[..., None], x, self.padding)
        if self.near is not None:
            x = x + self.near(x, mask)
        allowed = mask[:, None, None]
        for block in self.blocks:
            x = run(self, block, x, allowed)
        return self.norm(x), mask


class FrozenT5(OfCaptions):
    """The encoder half of a T5 (Imagen, section 2.1): writes `text` and `text_mask`.

    Args:
        path_or_name: a directory with config.json, the tokenizer and the weights, or the name of a
            model in the local Hugging Face cache, such as "google/t5-v1_1-xxl".
        length: context length; longer captions are cut and keep their end-of-text token.
        bf16: compute in bfloat16, for large models.
        padded: pad to `length`, and let the stage attend to the padding's states as well (IF).
        clean: applied to each caption before it is tokenized (IF: `published.captions.cleaned`).

    Raises (on first use):
        UserError: the directory lacks a file or a weight, the cache lacks the model, or the model
            or its tokenizer is of another kind.
    """

    writes = frozenset({"text", "text_mask"})

    def __init__(
        self,
        path_or_name: str,
        length: int = 256,
        bf16: bool = False,
        padded: bool = False,
        clean: Callable[[str], str] | None = None,
    ):
        self.name, self.length, self.padded = path_or_name, length, padded
        self.clean = clean or str
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @property
    def width(self) -> int:
        """w, the width of the states. Raises UserError if config.json is missing."""
        return t5_width(self.name)

    @property
    def parameters(self) -> int:
        """The number of its parameters. Raises UserError if config.json is missing."""
        return t5_parameters(self.name)

    @property
    def sizes(self) -> dict[str, int]:
        """The width of `text`, if the configuration is on this machine; loads nothing."""
        try:
            return {"text": self.width}
        except NotHere:
            return {}

    @property
    def former(self) -> Former:
        """The hash of earlier versions, which covered the weights alone."""
        return Former(self._weights, not self.padded and self.clean is str)

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`text` [b, n, w] and `text_mask` [b, n], padded to the longest caption or to `length`."""
        cut = {"max_length": self.length, "truncation": True}
        padding = "max_length" if self.padded else True
        own = list(map(self.clean, captions))
        found = self._tokenizer(own, **cut, padding=padding, return_tensors="pt")
        found = found.to(self.device)
        mask = found["attention_mask"]
        with torch.no_grad():
            states = self._model(found["input_ids"], attention_mask=mask).last_hidden_state
        return {"text": states, "text_mask": mask.bool() | self.padded}

    @cached_property
    def hash(self) -> str:
        """Identifies the weights, the architecture and what else changes the states."""
        more = {"padded": self.length} if self.padded else {}
        more |= {} if self.clean is str else {"clean": self.clean.__name__}
        return identity(self._weights, {**self._source.choices, **more})

    def tokenized(self, captions: Sequence[str]) -> list[list[int]]:
        own = list(map(self.clean, captions))
        return self._tokenizer(own, max_length=self.length, truncation=True).input_ids

    @cached_property
    def _source(self) -> T5Source:
        return t5_source(self.name)

    @cached_property
    def _weights(self) -> str:
        return weights_hash(self._source.weights)

    @cached_property
    def _tokenizer(self) -> Any:
        return t5_tokenizer(self._source.directory)

    @cached_property
    def _model(self) -> nn.Module:
        model = t5_network(self._source, self.name, self.dtype)
        return model.eval().requires_grad_(False).to(self.device)
