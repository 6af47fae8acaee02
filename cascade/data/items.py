"""From a sample, wherever it was read, to the item that training is given.

What is drawn of it, the crop and the caption, follows from the number under which it comes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from cascade.data.embeddings import Embeddings
from cascade.data.transforms import BadSample, Pictures, decode
from cascade.draws import generator

IDLE = np.random.default_rng(0)  # where nothing is drawn: to make a stream takes a while

# EXIF's numbers of the orientations, as img2dataset writes them: in exifread's words.
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


@runtime_checkable
class Sample(Protocol):
    """A key of a shard, and the members of that name."""

    @property
    def shard(self) -> str: ...

    @property
    def key(self) -> str: ...

    def read(self, member: str) -> bytes:
        """The bytes of "picture", "txt" or "json", b"" if there is none. May raise BadSample."""
        ...


class Items:
    """Makes items; for the arguments see `Shards`."""

    def __init__(
        self,
        pictures: Pictures,
        captions: Mapping[str, float] | None,
        embeddings: Mapping[str, Embeddings] | None,
        json_fields: Sequence[str],
        seed: int,
    ):
        self.pictures, self.json_fields, self.seed = pictures, tuple(json_fields), seed
        self.captions = {f: p for f, p in (captions or {"txt": 1.0}).items() if p > 0}
        self.embeddings = list((embeddings or {}).values())

    def __call__(
        self,
        sample: Sample,
        n: int,
        decoded: Callable[[], UInt8[np.ndarray, "s s 3"]] | None = None,
    ) -> dict[str, Any]:
        """A sample as number n shows it.

        Args:
            decoded: gives its picture, where it need not be decoded.

        Raises:
            BadSample: it cannot be used.
        """
        texts = captions_of(sample, self.captions)
        field, key = self._drawn(list(texts), n), sample.key
        item = {"sample": n, "key": f"{sample.shard}/{key}", "caption": texts[field]}
        if self.json_fields:
            fields = fields_of(sample)
            item |= {name: fields.get(name) for name in self.json_fields}
        if self.pictures.sizes:
            picture = decoded() if decoded else self.decoded(sample)
            drawn = self.pictures.crop or self.pictures.degrade
            item |= self.pictures.views(picture, generator(self.seed, "crop", n) if drawn else IDLE)
        for store in self.embeddings:
            item |= store.row(sample.shard, key, field)
        return item

    def decoded(self, sample: Sample) -> UInt8[np.ndarray, "s s 3"]:
        """Its picture at the largest size. Raises BadSample."""
        return picture_of(sample, self.pictures.largest)

    def _drawn(self, fields: Sequence[str], n: int) -> str:
        if len(fields) == 1:
            return fields[0]
        p = np.array([self.captions[field] for field in fields])
        return fields[generator(self.seed, "caption", n).choice(len(p), p=p / p.sum())]


def picture_of(sample: Sample, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture of a sample as `decode` gives it, turned as its JSON says if it does not itself.

    (img2dataset writes pictures as they are stored, and the camera's orientation into the JSON.)
    Raises BadSample.
    """
    data = sample.read("picture")
    try:
        fields = sample.read("json")
    except BadSample:  # whoever asks for a caption of it is told so
        fields = b""
    return decode(data, size, stated=stated_orientation(fields))


def stated_orientation(fields: bytes) -> int | None:
    """EXIF's number of an orientation in the `exif` of img2dataset's JSON, if there is one."""
    if b'"exif"' not in fields or b"Image Orientation" not in fields:
        return None
    try:
        return _ORIENTATIONS.get(json.loads(json.loads(fields)["exif"])["Image Orientation"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def captions_of(sample: Sample, captions: Iterable[str]) -> dict[str, str]:
    """The captions that a sample has, by field, of "txt" and fields of the JSON.

    Raises:
        BadSample: it has none, or its JSON is broken.
    """
    texts = dict.fromkeys(captions)
    if texts.keys() - {"txt"}:
        fields = fields_of(sample)
        texts = {field: fields.get(field) for field in texts}
    if "txt" in texts:
        texts["txt"] = sample.read("txt").decode(errors="replace")
    stripped = {field: t.strip() for field, t in texts.items() if isinstance(t, str)}
    there = {field: text for field, text in stripped.items() if text}
    if not there:
        raise BadSample("no caption")
    return there


def fields_of(sample: Sample) -> dict[str, Any]:
    """The JSON of a sample, empty if it has none.

    Raises:
        BadSample: it is broken, or cannot be read.
    """
    try:
        fields = json.loads(sample.read("json") or "{}")
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON") from error
    if not isinstance(fields, dict):
        raise BadSample("broken JSON")
    return fields
