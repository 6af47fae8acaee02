"""Describes the picture of every sample of a shard with a captioner.

Each draw of words depends on the seed, the sample's key and the caption's number alone, so captions
do not depend on the batch, or on the processes that share the work (`cascade.data.precompute`).
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cascade.data.embeddings import OFFSETS, Embeddings, Manifest
from cascade.data.items import Sample, picture_of
from cascade.data.precompute import made_of
from cascade.data.recaptions.reading import LEFT_OUT, PICTURE
from cascade.data.tars.keys import CAPTIONS as MEMBERS
from cascade.data.tars.tar import tars_of
from cascade.data.transforms import scaled
from cascade.draws import generator
from cascade.encoders.captioner import Captioner
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import identity
from cascade.files.stores.places import Place

_BETWEEN = re.compile(r"[,;.\n]")  # what separates tags


@dataclass(frozen=True)
class Asked:
    """What is asked of a captioner about each picture.

    Attributes:
        captioner: describes it.
        field: in which its captions are kept.
        samples: how many captions are drawn; 1: the most likely one, and nothing is drawn.
        seed: of the draws.
        tags: what it is asked for tags, which are separated by commas; None: there are none.
        clip: leaves out captions whose embedding's cosine with the picture's is below `least`.
    """

    captioner: Captioner
    field: str
    samples: int = 1
    seed: int = 0
    tags: str | None = None
    clip: FrozenCLIP | None = None
    least: float = 0.0

    @property
    def fields(self) -> list[str]:
        return [self.field, *(["tags"] if self.tags else [])]

    @property
    def about(self) -> Manifest:
        """The manifest of `rows`; its hash covers all that captions depend on."""
        one = self.captioner
        settings = {"prompt": one.prompt, "samples": self.samples, "tags": self.tags}
        settings |= {"seed": self.seed, "tokens": one.tokens, "bf16": one.bf16}
        settings |= {"clip": self.clip and self.clip.hash, "least": self.least}
        known = identity(one.hash, settings)
        dtypes = dict.fromkeys(self.fields, "uint8")
        return Manifest(one.name, known, {}, dtypes, captions=self.fields, settings=settings)


def rows(
    tar: Place, asked: Asked, batch: int = 16, workers: int = 0
) -> tuple[list[str], dict[str, Tensor]]:
    """Describe each sample of a tar, as `cascade.data.recaptions.reading` documents.

    A picture that cannot be decoded has no captions.

    Args:
        batch: pictures at a time, each of them with all its captions.
    """
    keys: list[str] = []
    texts: dict[str, list[list[str]]] = {field: [] for field in asked.fields}
    left_out: list[int] = []
    sums: list[int] = []
    make = partial(_picture, sizes=(asked.captioner.size, asked.clip and asked.clip.image_size))
    for some in made_of(tar, set(MEMBERS), make, workers, batch):
        found = _described({key: one for key, one in some if one is not None}, asked)
        for key, one in some:
            written, lost = found.get(key, ({}, 0))
            keys.append(key)
            for field in asked.fields:
                texts[field].append(written.get(field, []))
            left_out.append(lost)
            sums.append(one[1] if one else 0)
    tensors = {PICTURE: torch.tensor(sums), LEFT_OUT: torch.tensor(left_out, dtype=torch.int32)}
    for field, all_texts in texts.items():
        tensors |= _packed(field, all_texts)
    return keys, tensors


_Views = tuple[list[UInt8[np.ndarray, "_ _ 3"]], int]  # the picture at each size, and its CRC-32


def _picture(sample: Sample, sizes: Sequence[int | None]) -> _Views:
    views = [picture_of(sample, size) for size in sizes if size]
    return views, zlib.crc32(sample.read("picture"))


def _described(
    pictures: Mapping[str, _Views], asked: Asked
) -> dict[str, tuple[dict[str, list[str]], int]]:
    """Return the texts of each key by field, and how many captions were left out."""
    if not pictures:
        return {}
    drawn = [Image.fromarray(views[0]) for views, _ in pictures.values()]
    several, seeds = asked.samples, None
    if several > 1:
        seeds = [
            generator(asked.seed, f"caption {key}", i) for key in pictures for i in range(several)
        ]
    captions = asked.captioner(drawn, seeds, several)
    kept = captions if asked.clip is None else list(_fitting(pictures, captions, asked))
    found: list[dict[str, list[str]]] = [{asked.field: own} for own in kept]
    if asked.tags:
        answers = asked.captioner(drawn, prompt=asked.tags)
        for one, answer in zip(found, answers):
            one["tags"] = _tags(" ".join(answer))
    lost = [len(before) - len(after) for before, after in zip(captions, kept)]
    return dict(zip(pictures, zip(found, lost)))


def _fitting(
    pictures: Mapping[str, _Views], captions: Sequence[Sequence[str]], asked: Asked
) -> Iterator[list[str]]:
    """Yield the captions of each picture that fit it, as the CLIP sees them."""
    views = torch.stack([scaled(views[1]) for views, _ in pictures.values()])
    seen = F.normalize(asked.clip.image(views), dim=-1)
    for one, texts in zip(seen, captions):
        if not texts:
            yield []
            continue
        read = F.normalize(asked.clip.text(texts)["clip_text"], dim=-1)
        scores = (read @ one).tolist()
        yield [text for text, score in zip(texts, scores) if score >= asked.least]


def _tags(answer: str) -> list[str]:
    """Return the tags of an answer, without repetitions."""
    return list(dict.fromkeys(filter(None, map(str.strip, _BETWEEN.split(answer)))))


def _packed(field: str, texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Return each sample's texts as a row of bytes; none for no texts."""
    coded = [json.dumps(own, ensure_ascii=False).encode() if own else b"" for own in texts]
    ends = torch.tensor([0, *map(len, coded)]).cumsum(0)
    whole = np.frombuffer(b"".join(coded), np.uint8).copy()
    return {field: torch.from_numpy(whole), field + OFFSETS: ends}


def counted(data: Place, out: Place, field: str) -> tuple[int, int, int]:
    """Count the samples of the shards, those that have a caption, and the captions left out."""
    store, samples, captioned, lost = Embeddings(out), 0, 0, 0
    for tar in tars_of(data):
        file = store.opened(tar.stem)
        samples += len(file)
        captioned += file.filled(field)
        lost += int(file.tensor(LEFT_OUT).sum())
    return samples, captioned, lost
