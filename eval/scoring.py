"""From features to numbers with their protocol: what a set of pictures is worth in one space.

Every measure that the given things allow is taken, none is chosen: distances and neighbourhoods
where there is a reference, moments alone giving the Fréchet distance only; the Inception score in
Inception's space; the CLIP score in a CLIP's where there are captions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.errors import UserError
from cascade.eval import captions, interval, prompts
from cascade.eval.extraction import BLOCK, ordered
from cascade.eval.features import CLIPFeatures, Features, InceptionFeatures, distance_name
from cascade.eval.kernels import cmmd, cubic, gaussian, kid
from cascade.eval.manifold import in_balls, precision_recall
from cascade.eval.metrics import InceptionScore, cosines
from cascade.eval.record import Record
from cascade.eval.sets import PictureSet
from cascade.eval.statistics import Moments, warnings_for

FEWEST = 10  # pictures of a set: the splits of the Inception score

_CHUNK = 4096  # rows at a time


Make = Callable[..., Record]  # of name, value and whatever else is not of the whole set and space


def maker(space: Features, fields: Mapping[str, Any], said: Sequence[str]) -> Make:
    """Makes records in a space, of which `fields` are known, with `said` before other warnings."""
    known = {**fields, "extractor": space.name, "extractor_hash": space.hash}
    known["resize"] = space.resize

    def make(*, warnings: Sequence[str] = (), **more: Any) -> Record:
        return Record(**{**known, **more}, warnings=(*said, *warnings))

    return make


@dataclass(frozen=True)
class Reference:
    """What pictures are measured against in one space: features, or moments alone."""

    name: str
    hash: str
    count: int | None
    moments: Moments
    rows: Float[Tensor, "m d"] | None = None
    warnings: Sequence[str] = ()


def enough(pictures: PictureSet) -> None:
    """Raises UserError if a set is too small for any measure."""
    if len(pictures) < FEWEST:
        raise UserError(
            f"{pictures.path} has {len(pictures)} pictures: give at least {FEWEST} (and 10,000 for "
            "a number to be compared)"
        )


def protocol(pictures: PictureSet) -> dict[str, Any]:
    """What every record of a set says of its pictures."""
    sizes = sorted({f"{w}x{h}" for h, w in pictures.sizes})
    return {
        "count": len(pictures),
        "pictures": str(pictures.path),
        "pictures_hash": pictures.hash,
        "format": pictures.format,
        "size": sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes",
    }


def squashed(pictures: PictureSet) -> list[str]:
    """What to say of a set that is not all squares."""
    n = sum(h != w for h, w in pictures.sizes)
    return [f"{n:,} pictures are not square, and are squashed"] if n else []


def beware(pictures: PictureSet, other: PictureSet) -> list[str]:
    """What to say of a set that is measured against another one."""
    said = squashed(other)
    if set(pictures.sizes) != set(other.sizes):
        said.append("pictures and reference differ in size")
    if both := len(set(pictures.digests) & set(other.digests)):
        said.append(f"{both:,} pictures are in the reference as well")
    return said


def against(
    make: Make,
    space: Features,
    rows: Float[Tensor, "n d"],
    moments: Moments,
    to: Reference,
    draws: int,
) -> Iterator[Record]:
    """All that there is between the pictures and a reference.

    Args:
        draws: of the bootstrap; 0: no intervals from it.
    """
    count = len(rows) if to.count is None else min(len(rows), to.count)
    warnings = (*to.warnings, *warnings_for(count, space.dim))
    make = partial(
        make,
        reference=to.name,
        reference_count=to.count,
        reference_hash=to.hash,
        warnings=warnings,
    )
    mean, cov = to.moments.mean, to.moments.cov
    yield make(
        name=distance_name(space),
        value=moments.frechet(to.moments),
        interval=interval.of_frechet(rows, mean, cov, draws) if draws else None,
    )
    if to.rows is None:
        return
    yield from _discrepancies(make, space, rows, to.rows, draws)
    densities, covered = in_balls(rows, to.rows)
    shares = {**precision_recall(rows, to.rows), "coverage": covered.double().mean().item()}
    for name, value in shares.items():
        n = len(rows) if name == "precision" else len(to.rows)
        yield make(name=name, value=value, interval=interval.of_share(value, n))
    density = densities.mean().item()
    yield make(name="density", value=density, interval=interval.of_mean(densities))


def _discrepancies(
    make: Make, space: Features, rows: Tensor, real: Tensor, draws: int
) -> Iterator[Record]:
    if isinstance(space, CLIPFeatures):
        sure = None
        if draws:
            low, high = interval.of_kernel(gaussian, rows, real, unbiased=False, draws=draws)
            sure = 1000 * low, 1000 * high
        yield make(name="CMMD", value=cmmd(rows, real), interval=sure)
        return
    found = kid(rows, real)
    sure = interval.of_kernel(cubic, rows, real, unbiased=True, draws=draws) if draws else None
    yield make(name="KID", value=found["kid"], interval=sure)
    yield make(name="KID (subsets)", value=found["kid_subsets"], std=found["kid_subsets_std"])


def inception_score(
    make: Make, space: InceptionFeatures, rows: Float[Tensor, "n d"], draws: int
) -> Record:
    """Of the pictures alone."""
    metric, n = InceptionScore(), len(rows)

    def logits() -> Iterator[Float[Tensor, "b c"]]:
        for start in range(0, n, _CHUNK):
            yield space.logits(rows[start : start + _CHUNK]).cpu()

    for part, ids in zip(logits(), torch.arange(n).split(_CHUNK)):
        metric.update(part, ids)
    found = metric.compute()
    return make(
        name="Inception score",
        value=found["inception_score"],
        std=found["inception_score_std"],
        interval=interval.of_inception_score(logits(), n, draws=draws) if draws else None,
        warnings=warnings_for(n, 0),
    )


def clip_scores(
    make: Make,
    space: CLIPFeatures,
    rows: Float[Tensor, "n d"],
    pictures: PictureSet,
    found: Sequence[captions.Row],
) -> Iterator[Record]:
    """The mean cosine of picture and caption, of all and of each category of the prompts.

    Args:
        found: a row for each picture, in their order.
    """
    found = [found[i] for i in ordered(pictures)]
    texts = [row["caption"] for row in found]
    parts = [
        cosines(rows[i : i + BLOCK], space.clip.text(texts[i : i + BLOCK])["clip_text"])
        for i in range(0, len(texts), BLOCK)
    ]
    scores = torch.cat(parts).cpu()
    length = space.clip.length
    long = captions.too_long(texts, length)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(found):
        groups["CLIP score"].append(i)
        for name, value in row.items():
            if name.lower() in prompts.CATEGORIES:
                groups[f"CLIP score, {name} {value}"].append(i)
    for name, part in groups.items():
        values, cut = scores[part], sum(long[i] for i in part)
        said = [f"{cut:,} captions have more than {length} tokens, and are cut"] if cut else []
        yield make(
            name=name,
            value=values.mean().item(),
            count=len(part),
            interval=interval.of_mean(values) if len(part) > 1 else None,
            captions_hash=captions.hash_of(found),
            warnings=(*said, *warnings_for(len(part), 0)),
        )
