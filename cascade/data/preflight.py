"""Checks of the training data that take seconds, before a run occupies a device for hours."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cascade.data.items import CHOOSE, Items, fields_of
from cascade.data.tars.corpus import Corpus
from cascade.data.tars.index import counted
from cascade.data.tars.open_tar import Placed
from cascade.data.transforms import BadSample
from cascade.errors import UserError
from cascade.formats.rgb import suspicious, warn_of_white
from cascade.formats.texts import decoded, lines

log = logging.getLogger(__name__)

SAMPLES = 32  # how many samples are read, evenly spaced over the tars


def preflight(corpus: Corpus, make_item: Items, batch: int) -> None:
    """Check every tar's permissions, and read some samples as training would.

    Warns of pictures that are nearly all white.

    Args:
        batch: global batch size.

    Raises:
        UserError: unreadable tars, fewer samples than a batch, over a quarter of the samples read
            are bad (damaged pictures, no embeddings), or fields that none of them has.
    """
    on_disk = (tar for tar in corpus.paths if isinstance(tar, Path))
    if closed := [tar for tar in on_disk if not os.access(tar, os.R_OK)]:
        raise UserError(
            f"cannot read {closed[0]} ({len(closed)} such tars): change their permissions"
        )
    if (total := sum(corpus.counts)) < batch:
        raise UserError(
            f"batch={batch}, but there are {total} samples: choose a smaller batch, as no "
            "sample may occur twice in one"
        )
    reasons: Counter[str] = Counter()
    undecided: Counter[str] = Counter()
    found: set[str] = set()
    white: list[str] = []
    ends = np.cumsum(corpus.counts)
    for n in range(read := min(SAMPLES, total)):
        at = n * total // read
        tar = int(np.searchsorted(ends, at, side="right"))
        try:
            sample = Placed(corpus[tar], at - int(ends[tar] - corpus.counts[tar]))
            found |= _check(sample, make_item, undecided, white)
        except BadSample as reason:
            reasons[str(reason)] += 1
    warn_of_white(corpus.paths[0].parent, white, read)
    if too_many(reasons.total(), read):
        raise UserError(
            f"of {read} samples that were checked, {reasons.total()} are bad "
            f"({counted(reasons)}): repair the shards, or precompute their embeddings again"
        )
    for what, number in undecided.items():
        log.warning("%d of %d samples that were checked have %s: %s", number, read, what, CHOOSE)
    if missing := sorted({*make_item.captions, *make_item.json_fields} - found):
        raise UserError(
            f"none of {read} samples that were checked has {missing[0]}, but "
            f"{', '.join(sorted(found))}: set data.captions and data.json_fields to existing fields"
        )


def too_many(bad: int, checked: int) -> bool:
    """Return whether too many of the checked samples are bad to start training: over a quarter."""
    return 4 * bad > checked


def _check(sample: Placed, make_item: Items, undecided: Counter[str], white: list[str]) -> set[str]:
    """Read a sample as training would. Returns the names of its JSON's fields, and "txt".

    Counts fields with several captions in `undecided`, and adds suspiciously white pictures to
    `white`.
    """
    make_item(sample, 0)
    if make_item.recaptions:
        make_item.recaptions.check(sample)
    if make_item.pictures.sizes and suspicious(make_item.decoded(sample)):
        white.append(f"{sample.shard}/{sample.key}")
    wanted = {*make_item.captions, *make_item.json_fields} - {"txt"}
    fields = fields_of(sample) if wanted else {}
    undecided.update(several(sample, fields, make_item))
    own = fields.keys() - (make_item.recaptions.fields if make_item.recaptions else ())
    there = {name for name in own if fields[name] is not None}
    return there | make_item.texts(sample).keys() | ({"txt"} if sample.read("txt") else set())


def several(sample: Placed, fields: Mapping[str, Any], make_item: Items) -> Iterator[str]:
    """Describe the caption fields with several captions, if `data.several` does not say which."""
    if make_item.several is not None:
        return
    written = make_item.recaptions.fields if make_item.recaptions else ()
    for name in make_item.captions.keys() - written:
        if isinstance(value := fields.get(name), list) and len(value) > 1:
            yield f"a list of captions in {name}, which is ignored"
    text = decoded(sample.read("txt")) if "txt" in make_item.captions else ""
    if sum(bool(line.strip()) for line in lines(text)) > 1:
        yield "several lines in their txt, which are used as one caption"
