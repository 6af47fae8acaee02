"""The identity of an encoder: a hash of its weights and of every setting that affects its output.

The same weights give other embeddings with another activation. Earlier versions recorded a hash of
the weights alone. Such a hash stays valid where it cannot have meant another encoder: where a
directory's own configuration fixed the rest, or where there was no choice.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from cascade.batch import Batch


class Former(NamedTuple):
    """The hash that earlier versions recorded for an encoder, and what it leaves open.

    Attributes:
        hash: of the weights alone.
        again: whether they built this same encoder from the same settings.
        doubtful: names under which they may have built another encoder from the same weights.
    """

    hash: str
    again: bool = True
    doubtful: frozenset[str] = frozenset()


@runtime_checkable
class Encoder(Protocol):
    """Adds keys to a batch, as a frozen text encoder or a tokenizer does.

    An encoder is no submodule of its stage, so checkpoints do not hold its weights. It has these
    attributes (undeclared, as a runtime check of the protocol would compute them):

    * `name`, and `hash`, which identifies its weights and all choices that change its output;
    * `former`: the hash that earlier versions recorded (`Former`);
    * `reads` and `writes`: its batch keys;
    * `sizes`: the last dimension of what it writes, by key, as far as known without loading it;
    * `parameters`, where it can be told without the weights: their number, or NotHere;
    * `length`, where it is a choice: the greatest number of tokens;
    * `tokenized(captions)`, for weighted phrases: the tokens of each caption, the last of which is
      end-of-text, in the places that their states have.
    """

    def to(self, device: torch.device) -> "Encoder": ...

    def __call__(self, batch: Batch) -> Batch: ...


class OfCaptions:
    """An `Encoder` of captions that computes on one device, and loads its `_model` on first use.

    It is no module, so nothing that holds it saves it.
    """

    reads = frozenset({"caption"})
    device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "OfCaptions":
        """Sets the device that it computes on."""
        self.device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self.device)
        return self

    def __call__(self, batch: Batch) -> Batch:
        found = self.text(batch["caption"])
        return {**batch, **{key: found[key] for key in self.writes}}

    @cached_property
    def hash(self) -> str:
        """Identifies the weights and the architecture."""
        return identity(self._weights, self._source.choices)


def identity(weights: str, choices: Mapping[str, Any]) -> str:
    """The hash of an encoder, from its weights' hash and the choices that change its output."""
    text = json.dumps([weights, choices], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differs(encoder: Any, noted: str, name: str | None = None) -> str | None:
    """Why an encoder is not the one that a hash was recorded for; None if it is.

    Args:
        encoder: has a `name`, a `hash` and a `former`.
        name: the recorded encoder's name. None: it was built from the same settings.
    """
    if noted == encoder.hash:
        return None
    former = encoder.former
    if noted != former.hash:
        return f"its hash is {encoder.hash}, not {noted}"
    if former.again if name is None else name not in former.doubtful:
        return None
    return (
        f"the weights are the same, but {noted} was recorded by a version that read files of "
        "weights without QuickGELU, even if they need it"
    )


def formerly(encoder: Any) -> str:
    """The hash that earlier versions would have recorded for these settings."""
    return encoder.former.hash if encoder.former.again else encoder.hash
