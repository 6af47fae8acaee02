"""By what an encoder is known: a hash of its weights and of all that they do not show.

The same weights make other embeddings with another activation. Earlier versions noted a hash of the
weights alone, which stays valid where it cannot have meant another encoder: where a directory's own
configuration said the rest, or where there was nothing to choose.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Former(NamedTuple):
    """What earlier versions noted of an encoder, and what that leaves open.

    Attributes:
        hash: of the weights alone.
        again: whether they made this encoder of the same settings.
        doubtful: names under which they may have made another one of the same weights.
    """

    hash: str
    again: bool = True
    doubtful: frozenset[str] = frozenset()


def identity(weights: str, choices: Mapping[str, Any]) -> str:
    """The hash of weights with this hash, and of the choices that make a model of them."""
    text = json.dumps([weights, choices], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differs(encoder: Any, noted: str, name: str | None = None) -> str | None:
    """Why an encoder is not the one that a hash was noted of; None if it is.

    Args:
        encoder: has a `name`, a `hash` and a `former`.
        name: what the noted one was called. None: it was made of the same settings.
    """
    if noted == encoder.hash:
        return None
    former = encoder.former
    if noted != former.hash:
        return f"its hash is {encoder.hash}, not {noted}"
    if former.again if name is None else name not in former.doubtful:
        return None
    return (
        f"the weights are the same, but {noted} was noted by a version that read files of weights "
        "without QuickGELU, whether it belonged to them or not"
    )


def formerly(encoder: Any) -> str:
    """What earlier versions noted of an encoder that they made of the same settings."""
    return encoder.former.hash if encoder.former.again else encoder.hash
