"""Extraction of the features of a set, by one process or several that never wait for each other.

The set alone determines its division into parts. Process i of n computes parts i, i + n, ... and
writes each to a file; the process that finds all parts complete joins them. So each picture counts
once, numbers do not depend on the number of processes, a killed extraction resumes, and a process
that dies or has no part blocks no other.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.batch import image_key
from cascade.data.loading import collate
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.encoders.weights import weights_hash
from cascade.eval.metrics.features import Features
from cascade.eval.metrics.statistics import Moments, Origin, cached_rows
from cascade.eval.pictures.sets import PictureSet
from cascade.files.atomic import check_writable, remove
from cascade.files.locks import Claims

BLOCK = 64  # pictures at a time
PART = 16  # blocks of a part


class _Absent(Exception):
    """The features have not been computed yet."""


def ordered(pictures: PictureSet) -> list[int]:
    """The rows of the set in the order of their features."""
    return list(chain.from_iterable(pictures.blocks(BLOCK)))


def features_of(
    pictures: PictureSet,
    space: Features,
    folder: Path,
    device: torch.device,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n d"] | None:
    """The features of all pictures, memory mapped; None while parts of other shards are missing.

    Args:
        folder: where features of any sets and spaces are kept.
        shard: (i, n): this process computes parts i, i + n, ...
        progress: called with (pictures done, pictures in this shard).
    """
    origin = Origin.of(space, pictures.hash)
    blocks = pictures.blocks(BLOCK)
    parts = [blocks[i : i + PART] for i in range(0, len(blocks), PART)]
    beside = folder / f"parts-{key(origin)}"

    def part_of(blocks: Sequence[list[int]], compute: Callable) -> Float[Tensor, "n d"]:
        return cached_rows(beside, origin, [*chain(*blocks)], space.dim, compute)

    whole = partial(cached_rows, folder, origin, [*chain(*blocks)], space.dim)
    with suppress(_Absent):
        return whole(_absent)
    check_writable(folder, "give another --cache")
    mine = parts[shard[0] :: shard[1]]
    total, done = sum(len(block) for part in mine for block in part), 0
    for part in mine:
        part_of(part, partial(_computed, pictures, space, part, device))
        done += sum(map(len, part))
        if progress:
            progress(done, total)
    with Claims(folder) as claims, claims.held("features", wait=True):
        with suppress(_Absent):
            return whole(_absent)
        try:
            found = [part_of(part, _absent) for part in parts]
        except _Absent:
            return None
        joined = whole(lambda: iter(found))
        remove(beside)
        return joined


def features_of_split(data: Path, split: str, size: int, space: Features) -> Float[Tensor, "n d"]:
    """The features of all pictures of a split at `size` px, in order; cached next to the shards."""
    shards = Shards(data, Pictures((size,)), split, shuffle=False)
    tars, part = shards.corpus.paths, shards.corpus.part_of_tars
    origin = Origin.of(space, f"{size} px, {weights_hash(tars)}{part}")

    def rows() -> Iterator[Float[Tensor, "b d"]]:
        for start in range(0, len(shards), BLOCK):
            block = range(start, min(start + BLOCK, len(shards)))
            yield space(collate([shards[n] for n in block])[image_key(size)])

    try:
        return cached_rows(data / "features", origin, range(len(shards)), space.dim, rows)
    except OSError:  # read-only shards; raised before anything is computed
        return torch.cat([part.float().cpu() for part in rows()])


def moments_of(rows: Float[Tensor, "n d"], origin: Origin, folder: Path) -> Moments:
    """Mean and covariance of features, cached next to them in pytorch-fid's format."""
    for name in origin.names:
        if (path := folder / f"{key(name)}.npz").exists():
            kept = Moments.load(path)
            if kept.origin == name and kept.n == len(rows):
                return replace(kept, origin=origin)
    moments = reduce(add, (Moments.of(part, origin) for part in rows.split(BLOCK * PART)))
    with suppress(OSError):  # complete features may be in a read-only folder
        moments.save(folder / f"{key(origin)}.npz")
    return moments


def key(origin: Origin) -> str:
    """The name of files with features of this origin."""
    return hashlib.sha256(repr(origin).encode()).hexdigest()[:16]


def _computed(
    pictures: PictureSet, space: Features, blocks: Sequence[list[int]], device: torch.device
) -> Iterator[Float[Tensor, "b d"]]:
    for batch in pictures.batches(blocks):
        yield space(batch.to(device))


def _absent() -> Iterator[Tensor]:
    raise _Absent
