"""Shards: whether their index is theirs, what they hold, and whether their pictures are odd.

Of many tars some are read, evenly over all, and the findings say so.
"""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from cascade.data.corpus import MEND, OpenTar
from cascade.data.dataset import read_dataset, total
from cascade.data.embeddings import Embeddings
from cascade.data.index import CUT, Index, Summary, check_unchanged, counted, load, scan
from cascade.data.keys import CAPTIONS
from cascade.data.rgb import BadSample
from cascade.data.transforms import decode
from cascade.doctor.finding import Budget, Finding, note, problem, some, told, warning
from cascade.errors import UserError

TARS = 8  # that are read, without --full
LOOKS = 64  # pictures that are decoded
TINY = 64  # pixels of the shorter side
FLAT = 0.95  # of the pixels at the limit; img2dataset turns 16-bit pictures white

_PLAIN = ("not RGB", "turned")  # read rightly, and worth knowing
_EMBEDDINGS = ("embeddings", "text")  # folders of what was precomputed


def data(path: Path, full: bool, budget: Budget) -> Iterator[Finding]:
    """Of a folder of shards, or of one tar.

    Args:
        full: read all tars.
        budget: of reading headers, where there is no index.
    """
    folder = path if path.is_dir() else path.parent
    tars = sorted(folder.glob("*.tar")) if path.is_dir() else [path]
    listed = None
    try:
        listed = (dataset := read_dataset(folder)) and dataset.tars
    except UserError as error:
        yield told(error)
    else:
        yield from index(tars, listed, path.is_dir())
    yield from splits(tars)
    read, bad = _read([*tars] if full else _spread(tars, TARS), listed or {}, full, budget)
    yield from bad
    if read:
        whole = {tar.name: listed[tar.name] for tar in tars if tar.name in (listed or {})}
        yield from samples(whole or {i.tar.name: i.summary for i in read}, len(tars), len(read))
        yield from pictures(read)
    for name in _EMBEDDINGS:
        if (folder / name).is_dir():
            yield from embeddings(folder / name, [tar.stem for tar in tars])


def _spread(things: Sequence, most: int) -> list:
    """At most so many of them, evenly."""
    count = min(most, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def index(
    tars: Sequence[Path], listed: Mapping[str, Summary] | None, whole: bool
) -> Iterator[Finding]:
    """Whether `dataset.json` is of these tars.

    Args:
        whole: these are all of the folder.
    """
    folder = tars[0].parent
    remedy = f"run `cascade data index {folder}`"
    if listed is None:
        yield warning(
            "there is no index: every start reads all headers, and a tar that changes is not "
            "noticed",
            remedy,
        )
        return
    there = {tar.name for tar in tars}
    if whole and (gone := sorted(listed.keys() - there)):
        yield problem(
            f"{gone[0]} is gone ({some(len(gone), 'such tar')})", f"put it back, or {remedy}"
        )
    if new := sorted(there - listed.keys()):
        yield problem(f"{new[0]} is not in the index ({some(len(new), 'such tar')})", remedy)
    changed = []
    for tar in tars:
        try:
            if tar.name in listed:
                check_unchanged(tar, listed[tar.name])
        except UserError as error:
            changed.append(error)
    if changed:
        first = told(changed[0])
        yield problem(f"{first.what} ({some(len(changed), 'such tar')})", first.remedy)


def splits(tars: Sequence[Path]) -> Iterator[Finding]:
    """Which there are, and whether one is held out."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for tar in tars:
        match = re.match(r"([a-zA-Z]\w*)-", tar.name)
        found[match[1] if match else ""].append(tar)
    none = found.pop("", [])
    named = "train-*.tar and val-*.tar are splits"
    if not found:
        yield warning(
            "nothing is held out: names of tars tell no splits, so all are trained on and measured",
            f"rename some, or pack them anew: {named}",
        )
        return
    yield note(
        "splits: " + ", ".join(f"{name} ({some(len(of), 'tar')})" for name, of in found.items())
    )
    if none:
        yield warning(
            f"{none[0].name} is of no split, and never read ({some(len(none), 'such tar')})",
            f"rename it: {named}",
        )
    if "train" not in found:
        yield warning("there is no train-*.tar", "train with data.split=NAME, or rename: " + named)
    elif found.keys() == {"train"}:
        yield warning(
            "no split is held out: nothing can be measured, and sample grids have no captions",
            f"rename or pack some as val-*.tar, and train with grids=0 until then: {named}",
        )


def _read(
    tars: Sequence[Path], listed: Mapping[str, Summary], full: bool, budget: Budget
) -> tuple[list[Index], list[Finding]]:
    """The indexes of some tars, and what is wrong with them."""
    read, bad = [], []
    for tar in tars:
        look = partial(load if tar.name in listed and not full else scan, tar)
        try:
            found = budget.within(look)
            if tar.name in listed and found.summary != listed[tar.name]:
                raise UserError(
                    f"{tar.name} is not what its index says: run `cascade data index {tar.parent}`"
                )
            read.append(found)
        except TimeoutError:
            break
        except UserError as error:
            bad.append(told(error))
    return read, bad


def samples(summaries: Mapping[str, Summary], tars: int, read: int) -> Iterator[Finding]:
    """How many there are, and what was left out or has no caption."""
    sums = total(summaries.values())
    more = "" if read == tars else f"; {read} of {some(tars, 'tar')} opened, --full reads all"
    yield note(f"{some(sums.samples, 'sample')} in {some(len(summaries), 'tar')}{more}")
    if not sums.samples:
        yield problem(
            f"no sample can be used ({counted(sums.left_out)})",
            "a sample is a picture (jpg, jpeg, png, webp) and a caption (txt, json) side by side",
        )
        return
    for name in (name for name, one in summaries.items() if one.left_out.get(CUT)):
        yield problem(f"{name} is {CUT} after {summaries[name].samples:,} samples", MEND)
    if lost := {reason: n for reason, n in sums.left_out.items() if reason != CUT}:
        share = sum(lost.values()) / (sums.samples + sum(lost.values()))
        yield warning(
            f"{share:.1%} of all samples are left out ({counted(lost)})",
            "mend them, or train without them",
        )
    if without := sums.samples - sums.txt:
        yield warning(
            f"{without / sums.samples:.1%} of the samples have no .txt, but a .json",
            "choose its fields with data.captions, or they are left out",
        )


def pictures(read: Sequence[Index]) -> Iterator[Finding]:
    """What is odd about some of the pictures."""
    odd: Counter[str] = Counter()
    such: dict[str, str] = {}
    tars = [tar for tar in (OpenTar(found, {*CAPTIONS}) for found in read) if len(tar)]
    places = [(tar, i) for tar in tars for i in _spread(range(len(tar)), -(-LOOKS // len(tars)))]
    for tar, place in places:
        for what in _oddities(tar, place):
            odd[what] += 1
            such.setdefault(what, f"{tar.shard}/{tar.key(place)}")
    if places:
        yield note(f"{len(places)} pictures were looked at")
    for what, count in odd.items():
        said = f"{count} of {len(places)} are {what}, such as {such[what]}"
        if what in _PLAIN:
            yield note(said)
        elif what.startswith("nearly"):
            yield warning(said, "look at them: 16-bit pictures may have been written as 8-bit ones")
        elif what == "tiny":
            yield warning(said, f"leave out what is under {TINY} px: it teaches a stage to blur")
        else:
            many = 4 * count > len(places)
            yield (problem if many else warning)(said, "fetch or write them again")


def _oddities(tar: OpenTar, place: int) -> Iterator[str]:
    try:
        data = tar.read(place, "picture")
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            side, mode = min(image.size), image.mode
            turns = image.getexif().get(ExifTags.Base.Orientation, 1)
        square = decode(data, min(side, 256))
    except BadSample as reason:
        yield str(reason)
        return
    except Exception:  # on hostile bytes the decoders raise nearly anything
        yield "broken picture"
        return
    if mode != "RGB":
        yield "not RGB"
    if turns != 1:
        yield "turned"
    if side < TINY:
        yield "tiny"
    if np.mean((square >= 254).all(2)) > FLAT:
        yield "nearly all white"
    if np.mean((square <= 1).all(2)) > FLAT:
        yield "nearly all black"


def embeddings(folder: Path, shards: Sequence[str]) -> Iterator[Finding]:
    """Whether what was precomputed is there for every tar."""
    try:
        rows = Embeddings(folder)
        about = rows.about
        rows.require(shards)
    except UserError as error:
        yield told(error)
        return
    of = f" of {Path(about.encoder).name} ({about.hash})" if about else ", by an old version"
    yield note(f"{folder.name}{of}: for all tars")
