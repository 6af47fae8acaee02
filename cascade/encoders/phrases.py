"""Captions as users write them: weighted phrases, and negative captions.

With `weights`, `a (red:1.3) circle` is the caption "a red circle" with a phrase of weight 1.3. Its
logarithm is added to the logits of all attention to the phrase's tokens, so that each is attended
to as 1.3 of them would be. Vectors pooled from the caption are moved away from those of the caption
without the phrase by 0.3 of the difference. A weight of 1 is no weight, and 0 removes the phrase.
(Scaling the tokens' states would do nothing, because networks normalise them.)
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cascade.batch import Batch
from cascade.conditioning import weighed
from cascade.encoders.identity import Encoder
from cascade.errors import UserError
from cascade.formats.texts import brief

GREATEST = 10.0

_PART = re.compile(r"\\([\\()])|\(([^\\()]*):([^\\():]*)\)|([()])|([^\\()]+|\\)")
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


class Phrase(NamedTuple):
    """Some characters of a caption, from `start` to before `stop`, and their weight."""

    start: int
    stop: int
    weight: float


def parsed(text: str) -> tuple[str, tuple[Phrase, ...]]:
    r"""The caption and the phrases of a text such as `a (red:1.3) circle \(round\)`.

    Raises:
        UserError: a bracket is not part of a weighted phrase, or a weight is no number.
    """
    caption, phrases = "", []
    for escaped, phrase, weight, bracket, plain in _PART.findall(text):
        if bracket:
            raise _refusal(text, f"{bracket} belongs to no (phrase:weight)")
        if weight or phrase:
            number = weight.strip()
            if not _NUMBER.fullmatch(number) or float(number) > GREATEST:
                raise _refusal(text, f"{brief(number)} is no weight")
            if not phrase.strip():
                raise _refusal(text, "a phrase is empty")
            start = len(caption) + len(phrase) - len(phrase.lstrip())
            caption += phrase
            phrases.append(Phrase(start, len(caption.rstrip()), float(number)))
        else:
            caption += escaped or plain
    return caption, tuple(phrase for phrase in phrases if phrase.weight != 1)


def _refusal(text: str, why: str) -> UserError:
    return UserError(
        f"{brief(text)!r}: {why}: write (phrase:1.3), with a weight from 0 to {GREATEST:g}, or \\( "
        "and \\) for brackets; or leave --weights out"
    )


def asked(texts: Sequence[str], negative: str | None = None, weights: bool = False) -> Batch:
    """The batch keys of what a user asks for: `caption`, `phrases` and, if given, `negative`.

    Args:
        negative: what guidance leads away from, for all captions; None: from no caption.
        weights: whether the texts have weighted phrases; otherwise brackets are brackets.

    Raises:
        UserError: weights that cannot be read.
    """
    found: Batch = _keys(texts, weights, "caption", "phrases")
    if negative is not None:
        found |= _keys([negative] * len(texts), weights, "negative", "negative_phrases")
    return found


def _keys(texts: Sequence[str], weights: bool, *names: str) -> Batch:
    if not weights:
        return {names[0]: list(texts)}
    read = [parsed(text) for text in texts]
    return {name: [pair[i] for pair in read] for i, name in enumerate(names)}


def away_from(batch: Batch, encoders: Sequence[Encoder]) -> Batch:
    """The batch with its negative captions as captions, without what encoders write for others."""
    old = {"phrases"}.union(*(encoder.writes for encoder in encoders))
    kept = {key: value for key, value in batch.items() if key not in old}
    more = {"phrases": batch["negative_phrases"]} if "negative_phrases" in batch else {}
    return {**kept, **more, "caption": batch["negative"]}


def without(caption: str, phrase: Phrase) -> str:
    """A caption without one of its phrases."""
    return " ".join(f"{caption[: phrase.start]} {caption[phrase.stop :]}".split())


def encoded(encoder: Encoder, batch: Batch) -> Batch:
    """What an encoder writes, with the phrases of the batch weighed.

    Adds for `text` or `tokens` the log-weights `text_weights` or `tokens_weights` [b, n], moves
    `clip_text` on its sphere, and adds to `lacking` what the encoder writes for the k captions that
    lack one phrase, and its `share` [b, k].

    Raises:
        UserError: a phrase cannot be told apart in the encoder's tokens.
    """
    found = encoder(batch)
    rows = [(i, phrase) for i, some in enumerate(batch.get("phrases", ())) for phrase in some]
    if not rows:
        return found
    captions = batch["caption"]
    lacking = encoder({"caption": [without(captions[i], phrase) for i, phrase in rows]})
    lacking = {key: lacking[key] for key in encoder.writes}
    share = torch.zeros(len(captions), len(rows), device=lacking[min(lacking)].device)
    for k, (i, phrase) in enumerate(rows):
        share[i, k] = phrase.weight - 1
    for key in encoder.writes & {"text", "tokens"}:
        weights = torch.zeros(found[key].shape[:2], device=share.device)
        for i, phrase in rows:
            places = tokens_of(encoder, captions[i], phrase)
            weights[i, places] = math.log(phrase.weight) if phrase.weight else -math.inf
        found[f"{key}_weights"] = weights
    if "clip_text" in encoder.writes:
        z = found["clip_text"]
        found["clip_text"] = _on_sphere(z, weighed(z, lacking["clip_text"], share.to(z)), share)
    return {**found, "lacking": {**batch.get("lacking", {}), **lacking, "share": share}}


def _on_sphere(
    z: Float[Tensor, "b d"], moved: Float[Tensor, "b d"], share: Float[Tensor, "b k"]
) -> Float[Tensor, "b d"]:
    """The moved embeddings with unit norm; those of captions without phrases to the bit."""
    return torch.where(share.any(1, keepdim=True), F.normalize(moved, dim=1), z)


def tokens_of(encoder: Any, caption: str, phrase: Phrase) -> slice:
    """The places of a phrase among the tokens of a caption.

    Raises:
        UserError: the encoder does not tell tokens, the phrase begins or ends within a token, or
            the encoder does not read as far.
    """
    words = brief(caption[phrase.start : phrase.stop])
    if not hasattr(encoder, "tokenized"):
        raise UserError(f"{type(encoder).__name__} has no `tokenized`: leave --weights out")
    texts = [caption, *(caption[:end].rstrip() for end in (phrase.start, phrase.stop))]
    whole, *begun = encoder.tokenized(texts)
    ends = [len(tokens) - 1 for tokens in begun]  # each ends with end-of-text
    if any(tokens[:end] != whole[:end] for tokens, end in zip(begun, ends)):
        raise UserError(f"({words}:...) begins or ends within a word: weigh the whole word")
    if ends[0] == ends[1]:
        raise UserError(
            f"({words}:...) exceeds the {len(whole)} tokens that the text encoder reads: "
            "shorten the caption"
        )
    return slice(*ends)
