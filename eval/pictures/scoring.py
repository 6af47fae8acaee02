"""From features to records: every measure that the given data allow, each with its protocol.

With a reference set these are distances and neighbourhood measures; with moments alone, the Fréchet
distance; in Inception's space the Inception score; in a CLIP's space, with captions, its score.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.errors import UserError
from cascade.eval.metrics.distances import cosines
from cascade.eval.metrics.features import CLIPFeatures, Features, InceptionFeatures, distance_name
from cascade.eval.metrics.measures import FRECHET, PICTURES, Measure, Sample, measures
from cascade.eval.metrics.statistics import Moments, warnings_for
from cascade.eval.pictures import captions, prompts
from cascade.eval.pictures.extraction import BLOCK, ordered
from cascade.eval.pictures.record import Record
from cascade.eval.pictures.sets import PictureSet

FEWEST = 10  # pictures of a set: one for each split of the Inception score


@dataclass(frozen=True)
class Reference:
    """What pictures are compared to in one feature space: features, or moments alone."""

    name: str
    hash: str
    count: int | None
    moments: Moments
    rows: Float[Tensor, "m d"] | None = None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Captions:
    """The captions of a set, in the order of its features, and their cosines with the pictures."""

    rows: list[captions.CaptionRow]
    cosines: Float[Tensor, " n"]
    long: list[bool]
    length: int

    @classmethod
    def of(
        cls,
        space: CLIPFeatures,
        rows: Float[Tensor, "n d"],
        pictures: PictureSet,
        found: Sequence[captions.CaptionRow],
    ) -> "Captions":
        """Encodes the captions `found`, a row for each picture in the set's order.

        Args:
            rows: the pictures' features.
        """
        found = [found[i] for i in ordered(pictures)]
        texts = [row["caption"] for row in found]
        parts = [
            cosines(rows[i : i + BLOCK], space.clip.text(texts[i : i + BLOCK])["clip_text"])
            for i in range(0, len(texts), BLOCK)
        ]
        length = space.clip.length
        return cls(found, torch.cat(parts).cpu(), captions.too_long(texts, length), length)

    def groups(self, name: str) -> dict[str, list[int]]:
        """The rows of all captions, and of each category of the prompts, by name of the measure."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            groups[name].append(i)
            for column, value in row.items():
                if column.lower() in prompts.CATEGORIES:
                    groups[f"{name}, {column} {value}"].append(i)
        return groups


def enough(pictures: PictureSet) -> None:
    """Raises UserError if a set is too small for any measure."""
    if len(pictures) < FEWEST:
        raise UserError(
            f"{pictures.path} has {len(pictures)} pictures: give at least {FEWEST} (and 10,000 for "
            "a number to be compared)"
        )


def protocol(pictures: PictureSet) -> dict[str, Any]:
    """The fields of a record that describe the measured set."""
    sizes = sorted({f"{w}x{h}" for h, w in pictures.sizes})
    return {
        "count": len(pictures),
        "pictures": str(pictures.path),
        "pictures_hash": pictures.hash,
        "format": pictures.format,
        "size": sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes",
    }


def squashed(pictures: PictureSet) -> list[str]:
    """A warning if not all pictures of a set are square."""
    n = sum(h != w for h, w in pictures.sizes)
    return [f"{n:,} pictures are not square, and are squashed"] if n else []


def mismatches(pictures: PictureSet, other: PictureSet) -> list[str]:
    """Warnings about a reference set `other`."""
    found = squashed(other)
    if set(pictures.sizes) != set(other.sizes):
        found.append("pictures and reference differ in size")
    if both := len(set(pictures.digests) & set(other.digests)):
        found.append(f"{both:,} pictures are in the reference as well")
    return found


def without_reference(space: Features, captioned: bool) -> bool:
    """Whether some measure can be computed in a space from the pictures and captions alone."""
    given = {"logits"} if isinstance(space, InceptionFeatures) else set()
    given |= {"cosines"} if captioned and isinstance(space, CLIPFeatures) else set()
    return any(given.issuperset(measure.reads) for measure in measures(PICTURES))


def records(
    known: Mapping[str, Any], of: Sample, to: Reference | None, captioned: Captions | None
) -> Iterator[Record]:
    """A record of every measure that applies to a sample.

    Args:
        known: the fields of every record; its `warnings` come first.
    """
    space, n = of.space, len(of.rows)
    known = {**known, "extractor": space.name, "extractor_hash": space.hash, "resize": space.resize}
    alone = {"warnings": warnings_for(n, 0)}
    compared = to and {
        "reference": to.name,
        "reference_count": to.count,
        "reference_hash": to.hash,
        "warnings": (
            *to.warnings,
            *warnings_for(n if to.count is None else min(n, to.count), space.dim),
        ),
    }
    for measure in measures(PICTURES, of):
        if "cosines" in measure.reads:
            yield from _by_group(known, measure, of, captioned)
        else:
            name = distance_name(space) if measure == FRECHET else measure.name
            fields = compared if {"real", "reference"} & set(measure.reads) else alone
            yield from _record(known, measure, of, name=name, **fields)


def _by_group(
    known: Mapping[str, Any], measure: Measure, of: Sample, found: Captions
) -> Iterator[Record]:
    for name, part in found.groups(measure.name).items():
        some = replace(of, rows=of.rows[part], cosines=of.cosines[part])
        cut = sum(found.long[i] for i in part)
        warnings = [f"{cut:,} captions have more than {found.length} tokens, and are cut"]
        warnings = [*(warnings if cut else ()), *warnings_for(len(part), 0)]
        fields = {"count": len(part), "captions_hash": captions.hash_of(found.rows)}
        yield from _record(known, measure, some, warnings, name=name, **fields)


def _record(
    known: Mapping[str, Any], measure: Measure, of: Sample, warnings: Sequence[str], **fields: Any
) -> Iterator[Record]:
    value = measure.compute(of)
    if value is not None:
        fields |= {"interval": measure.interval(of), "std": measure.deviation(of)}
        fields |= {"warnings": (*known["warnings"], *warnings)}
        yield Record(**{**known, **fields}, value=value)
