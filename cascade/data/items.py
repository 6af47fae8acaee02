"""Turns a sample, from a file or a stream, into the item that training gets.

The random choices, crop and caption, are functions of the seed and the sample number.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8

from cascade.buckets import Buckets, Shape
from cascade.data.embeddings import Embeddings
from cascade.data.recaptions.reading import Recaptions, recaptions_of
from cascade.data.transforms import BadSample, Pictures, decode, framed
from cascade.draws import generator
from cascade.errors import UserError
from cascade.files.stores.places import Place
from cascade.formats.texts import BadText, encodable, lines
from cascade.formats.texts import decoded as text_of

SEVERAL = (None, "first", "drawn", "all")  # which captions of a list, or lines of a `txt`, to use

CHOOSE = "choose +data.several=first, drawn or all"

MAX_BAD_IN_A_ROW = 1000  # bad samples after which the search for a good one is given up

# Passed where nothing is drawn: creating a generator is slow, and this happens for each sample.
UNUSED = np.random.default_rng(0)

# EXIF's orientation numbers by exifread's names, which img2dataset writes.
_ORIENTATIONS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}


class Skip(NamedTuple):
    """A bad sample ("shard/key") that was skipped in favour of the next one for number `sample`."""

    sample: int
    key: str
    reason: str


class Bucket(NamedTuple):
    """The shape that a picture is framed in, in pixels of its largest size."""

    of: Buckets
    shape: Shape


@runtime_checkable
class Sample(Protocol):
    """A key of a shard, and its members (files)."""

    @property
    def shard(self) -> str: ...

    @property
    def key(self) -> str: ...

    def read(self, member: str) -> bytes:
        """Return the bytes of "picture", "txt" or "json", b"" if absent. May raise BadSample.

        Samples of indexed tars also have further files, by extension.
        """


class Items:
    """Makes items from samples; `Shards` documents the arguments."""

    def __init__(
        self,
        pictures: Pictures,
        captions: Mapping[str, float] | None,
        embeddings: Mapping[str, Embeddings] | None,
        json_fields: Sequence[str],
        seed: int,
        several: str | None = None,
        recaptions: str | Place | None = None,
    ):
        if several not in SEVERAL:
            raise UserError(f"data.several={several}: choose first, drawn or all, or omit it")
        self.pictures, self.json_fields, self.seed = pictures, tuple(json_fields), seed
        self.several = several
        self.captions = {f: p for f, p in (captions or {"txt": 1.0}).items() if p > 0}
        self.embeddings = list((embeddings or {}).values())
        self.recaptions = recaptions_of(recaptions, self.captions)

    @property
    def stores(self) -> list[Embeddings]:
        """The folders that samples are joined with."""
        return [*self.embeddings, *([self.recaptions] if self.recaptions else [])]

    def texts(self, sample: Sample) -> dict[str, list[str]]:
        """Return the captions that one is drawn from, by field. Raises BadSample."""
        return captions_of(sample, self.captions, self.several, self.recaptions)

    def __call__(
        self,
        sample: Sample,
        n: int,
        decoded: Callable[[], UInt8[np.ndarray, "s s 3"]] | None = None,
        bucket: Bucket | None = None,
    ) -> dict[str, Any]:
        """Make the item of a sample under number n, which determines its crop and caption.

        Args:
            decoded: returns its picture from a cache; None: decode it.
            bucket: what its picture is framed in, which the keys of `FRAMING` then describe; None:
                it is the centred square.

        Raises:
            BadSample: the sample cannot be used.
        """
        field, caption = self._drawn(self.texts(sample), n)
        key = sample.key
        item = {"sample": n, "key": f"{sample.shard}/{key}", "caption": caption}
        if self.json_fields:
            fields = fields_of(sample)
            item |= {name: fields.get(name) for name in self.json_fields}
        if self.pictures.sizes:
            drawn = bucket or self.pictures.crop or self.pictures.degrade
            rng = generator(self.seed, "crop", n) if drawn else UNUSED
            if bucket:
                place = partial(bucket.of.place, rng=rng)
                picture, framing = framed(*stored(sample), bucket.shape, place)
                item |= {key: torch.tensor(pair) for key, pair in framing.items()}
            else:
                picture = decoded() if decoded else self.decoded(sample)
            item |= self.pictures.views(picture, rng, sample)
        for store in self.embeddings:
            item |= store.row(sample.shard, key, field)
        return item

    def decoded(self, sample: Sample) -> UInt8[np.ndarray, "s s 3"]:
        """Decode the sample's picture at the largest size. Raises BadSample."""
        return picture_of(sample, self.pictures.largest)

    def _drawn(self, texts: Mapping[str, Sequence[str]], n: int) -> tuple[str, str]:
        """Draw a caption field by its rate, then one of its captions uniformly."""
        fields = list(texts)
        choice = len(fields) > 1 or any(len(found) > 1 for found in texts.values())
        rng = generator(self.seed, "caption", n) if choice else UNUSED
        if len(fields) > 1:
            p = np.array([self.captions[field] for field in fields])
            fields = [fields[rng.choice(len(p), p=p / p.sum())]]
        found = texts[fields[0]]
        return fields[0], found[rng.integers(len(found)) if len(found) > 1 else 0]


def picture_of(sample: Sample, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decode a sample's picture, rotated by its own EXIF orientation or else by that in its JSON.

    (img2dataset stores pictures unrotated, and the camera's orientation in the JSON.)
    Raises BadSample.
    """
    data, stated = stored(sample)
    return decode(data, size, stated=stated)


def stored(sample: Sample) -> tuple[bytes, int | None]:
    """Return the file of a sample's picture, and the orientation in its JSON. Raises BadSample."""
    data = sample.read("picture")
    try:
        fields = sample.read("json")
    except BadSample:  # reported where a caption is read from the JSON
        fields = b""
    return data, stated_orientation(fields)


def stated_orientation(fields: bytes) -> int | None:
    """Return EXIF's orientation number from the `exif` of img2dataset's JSON, if there is one."""
    if b'"exif"' not in fields or b"Image Orientation" not in fields:
        return None
    try:
        return _ORIENTATIONS.get(json.loads(json.loads(fields)["exif"])["Image Orientation"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def captions_of(
    sample: Sample,
    captions: Iterable[str],
    several: str | None = None,
    recaptions: Recaptions | None = None,
) -> dict[str, list[str]]:
    """Return the captions of a sample by field: "txt", or a field of its JSON.

    Args:
        several: which captions of a list in the JSON, or of the lines of a `txt`, to return:
            "first", "all" (joined into one), or "drawn" (each of them; the caller draws). None: a
            `txt` is one caption, however many lines it has, and a longer list is ignored.
        recaptions: fields that a captioner wrote, in place of those of the JSON. Several captions
            in one are several samples of it, and "drawn" unless otherwise asked.

    Raises:
        BadSample: no caption, a text of unknown encoding, or broken JSON.
    """
    values: dict[str, Any] = dict.fromkeys(captions)
    written = recaptions.of(sample.shard, sample.key) if recaptions else {}
    if values.keys() - {"txt"} - written.keys():
        fields = fields_of(sample)
        values = {field: fields.get(field) for field in values}
    if "txt" in values:
        text = _text(sample, "txt", "caption")
        values["txt"] = text if several is None else lines(text)
    found = {
        field: _chosen(written[field], several or "drawn")
        if field in written
        else _chosen(value, several)
        for field, value in values.items()
    }
    there = {field: texts for field, texts in found.items() if texts}
    if not there:
        lists = several is None and any(isinstance(value, list) for value in values.values())
        raise BadSample(f"captions in a list: {CHOOSE}" if lists else "no caption")
    return there


def _chosen(value: Any, several: str | None) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    texts = [encodable(t.strip()) for t in entries if isinstance(t, str) and t.strip()]
    if several == "all":
        return [" ".join(texts)] if texts else []
    if several is None and len(texts) > 1:
        return []
    return texts[:1] if several == "first" else texts


def _text(sample: Sample, member: str, what: str) -> str:
    try:
        text = text_of(sample.read(member))
    except BadText as error:
        raise BadSample(f"{what} is {error}") from error
    if "\0" in text:
        raise BadSample(f"{what} holds a zero byte, and so more than it should")
    return text


def fields_of(sample: Sample) -> dict[str, Any]:
    """Return the JSON of a sample, {} if it has none.

    Raises:
        BadSample: the JSON is broken or cannot be read.
    """
    try:
        fields = json.loads(_text(sample, "json", "JSON") or "{}")
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON") from error
    if not isinstance(fields, dict):
        raise BadSample("broken JSON")
    return fields
