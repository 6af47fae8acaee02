"""What can be known about a configuration's data before a device is taken: seconds, not hours."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cascade.data.corpus import Placed
from cascade.data.index import counted
from cascade.data.items import CHOOSE, Items, fields_of
from cascade.data.rgb import suspicious, warn_of_white
from cascade.data.shards import Shards
from cascade.data.transforms import BadSample
from cascade.errors import UserError
from cascade.texts import decoded, lines

log = logging.getLogger(__name__)

LOOKS = 32  # samples that are looked at, evenly over the tars


def preflight(shards: Shards, batch: int) -> None:
    """Looks at every tar's rights and at some samples, as training would read them.

    Pictures among them that are nearly all white are warned of.

    How many workers there are plays no part: each may read any tar.

    Args:
        batch: of all ranks together.

    Raises:
        UserError: tars that cannot be read, fewer samples than a batch, over a quarter of those
            looked at are bad (damaged pictures, no embeddings), or fields that none of them has.
    """
    closed = [tar for tar in shards.corpus.paths if not os.access(tar, os.R_OK)]
    if closed:
        raise UserError(f"cannot read {closed[0]} ({len(closed)} such tars): change their rights")
    if len(shards) < batch:
        raise UserError(
            f"batch={batch}, but there are {len(shards)} samples: choose a smaller batch, as no "
            "sample may come twice in one"
        )
    reasons: Counter[str] = Counter()
    undecided: Counter[str] = Counter()
    found: set[str] = set()
    white: list[str] = []
    ends = np.cumsum(shards.corpus.counts)
    for n in range(looks := min(LOOKS, len(shards))):
        at = n * len(shards) // looks
        tar = int(np.searchsorted(ends, at, side="right"))
        try:
            place = at - int(ends[tar] - shards.corpus.counts[tar])
            found |= _look(shards, tar, place, undecided, white)
        except BadSample as reason:
            reasons[str(reason)] += 1
    warn_of_white(shards.corpus.paths[0].parent, white, looks)
    if too_many(reasons.total(), looks):
        raise UserError(
            f"of {looks} samples looked at {reasons.total()} are bad ({counted(reasons)}): mend "
            "the shards, or what was precomputed of them"
        )
    for what, number in undecided.items():
        log.warning("%d of %d samples looked at have %s: %s", number, looks, what, CHOOSE)
    if missing := sorted({*shards.make_item.captions, *shards.make_item.json_fields} - found):
        raise UserError(
            f"none of {looks} samples looked at has {missing[0]}, but {', '.join(sorted(found))}: "
            "set data.captions and data.json_fields to what there is"
        )


def too_many(bad: int, looks: int) -> bool:
    """Whether no training begins where so many samples are bad, of those looked at."""
    return 4 * bad > looks


def _look(
    shards: Shards, tar: int, place: int, undecided: Counter[str], white: list[str]
) -> set[str]:
    """Reads a sample as training would. Returns the names of its fields, and "txt".

    Adds to `undecided` what it has several captions in, and to `white` its name if its picture is
    suspicious.
    """
    shards.item(tar, place, 0)
    sample, reads = Placed(shards.corpus[tar], place), shards.make_item
    if reads.pictures.sizes and suspicious(reads.decoded(sample)):
        white.append(f"{sample.shard}/{sample.key}")
    fields = fields_of(sample) if {*reads.captions, *reads.json_fields} - {"txt"} else {}
    undecided.update(several(sample, fields, reads))
    there = {name for name, value in fields.items() if value is not None}
    return there | ({"txt"} if sample.read("txt") else set())


def several(sample: Placed, fields: Mapping[str, Any], reads: Items) -> Iterator[str]:
    """Where a sample has several captions, and nobody said which to take, in words."""
    if reads.several is not None:
        return
    for name in reads.captions:
        if isinstance(value := fields.get(name), list) and len(value) > 1:
            yield f"a list of captions in {name}, which is passed over"
    text = decoded(sample.read("txt")) if "txt" in reads.captions else ""
    if sum(bool(line.strip()) for line in lines(text)) > 1:
        yield "several lines in their txt, which are taken for one caption"
