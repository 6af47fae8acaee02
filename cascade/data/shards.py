"""Training samples from WebDataset tars: the sample number alone says what is read.

Sample n is place n mod N in the permutation of epoch n div N, whatever the batch, the rank and the
number of workers are, so that a run that goes on needs one integer. What is joined to a sample is
joined by (shard, key), never by row. A bad sample is replaced by the next good one of the
permutation, and counted. Nothing here unpickles: shards yield bytes, JSON and safetensors.
"""

import json
import logging
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cascade.conditioning import Batch
from cascade.data.embeddings import Embeddings
from cascade.data.index import Entry, Paths, counted, samples
from cascade.data.transforms import BadSample, Pictures, decode
from cascade.draws import generator
from cascade.errors import UserError

log = logging.getLogger(__name__)

CACHE_BYTES = 2 * 2**30


class Shards(Dataset):
    """The samples of a folder of shards, indexed by sample number n = 0, 1, 2, ... without end.

    An item has `sample`, `key` ("shard/key"), `caption`, the `image_{size}` of `pictures`, the
    rows of `embeddings`, the `json_fields`, and `skipped`: why the bad samples were left out in
    whose place it stands. The attribute `skipped` counts those that were never in the order.

    Args:
        path: a folder, a glob, or a list of tars.
        pictures: which sizes, and which crop.
        split: only tars called `{split}-*`; all, if the names carry no split.
        captions: caption fields, "txt" or a field of the JSON, and how often each is taken. A
            sample that lacks some of them is captioned by the others. None: the `txt`.
        seed: of the order, the crops and the captions.
        shuffle: whether each epoch has an order of its own; otherwise that of the tars.
        embeddings: precomputed folders; their names are there for a configuration to override.
        json_fields: what else of the JSON the items carry, as it is; None where it is missing.
        cache: whether to keep the decoded pictures in memory, if all fit into `CACHE_BYTES`;
            forked workers share them.

    Raises:
        UserError: no tars, no usable sample in them, or embeddings that lack over 1 % of them.
    """

    def __init__(
        self,
        path: Paths,
        pictures: Pictures,
        split: str = "train",
        captions: Mapping[str, float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        embeddings: Mapping[str, Embeddings] | None = None,
        json_fields: Sequence[str] = (),
        cache: bool = False,
    ):
        self.pictures, self.seed, self.shuffle = pictures, seed, shuffle
        self.captions = {f: p for f, p in (captions or {"txt": 1.0}).items() if p > 0}
        self.embeddings = list((embeddings or {}).values())
        self.json_fields = tuple(json_fields)
        members = {"txt" if field == "txt" else "json" for field in self.captions}
        self.entries, self.skipped = samples(path, split, members)
        self._reads_json = bool(self.json_fields) or "json" in members
        for store in self.embeddings:
            self._leave_out_what_lacks(store)
        self._order = (-1, np.empty(0, int))
        self._cache = _cache(len(self.entries), pictures.largest) if cache else None

    def _leave_out_what_lacks(self, store: Embeddings) -> None:
        lacking = [e for e in self.entries if not store.has(e.shard.stem, e.key)]
        if not lacking:
            return
        # Single bad samples could not be embedded; more than that, and the folder is another's.
        if len(lacking) > max(1, len(self.entries) // 100):
            store.row(lacking[0].shard.stem, lacking[0].key)
        log.warning("%s: samples left out: %d no embedding", store.folder, len(lacking))
        self.skipped["no embedding"] += len(lacking)
        self.entries = [e for e in self.entries if store.has(e.shard.stem, e.key)]

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.entries)

    def __getitem__(self, n: int) -> dict[str, Any]:
        epoch, place = divmod(n, len(self))
        order, skipped = self._permutation(epoch), []
        for i in range(len(self)):
            try:
                item = self._item(int(order[(place + i) % len(self)]), n)
            except BadSample as reason:
                skipped.append(str(reason))
            else:
                return {**item, "skipped": skipped}
        raise UserError(f"all samples are bad ({counted(Counter(skipped))}): check the shards")

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            rng = generator(self.seed, "order", epoch)
            order = rng.permutation(len(self)) if self.shuffle else np.arange(len(self))
            self._order = (epoch, order)
        return self._order[1]

    def _item(self, place: int, n: int) -> dict[str, Any]:
        entry = self.entries[place]
        fields = _fields(entry) if self._reads_json else {}
        item = {"sample": n, "key": f"{entry.shard.stem}/{entry.key}"}
        item["caption"] = self._caption(entry, fields, n)
        item |= {name: fields.get(name) for name in self.json_fields}
        if self.pictures.sizes:
            item |= self.pictures.views(self._picture(place), generator(self.seed, "crop", n))
        for store in self.embeddings:
            item |= store.row(entry.shard.stem, entry.key)
        return item

    def _caption(self, entry: Entry, fields: dict[str, Any], n: int) -> str:
        fields = {**fields, "txt": entry.read("txt").decode(errors="replace")}
        texts = {f: fields.get(f) for f in self.captions}
        there = [f for f, text in texts.items() if isinstance(text, str) and text.strip()]
        if not there:
            raise BadSample("no caption")
        p = np.array([self.captions[f] for f in there])
        drawn = generator(self.seed, "caption", n).choice(len(p), p=p / p.sum())
        return texts[there[drawn]].strip()

    def _picture(self, place: int) -> UInt8[np.ndarray, "s s 3"]:
        if self._cache is None:
            return self._decoded(place)
        pixels, filled = self._cache
        if not filled[place]:
            pixels[place] = self._decoded(place)
            filled[place] = True  # last, as another worker may be looking
        return pixels[place]

    def _decoded(self, place: int) -> UInt8[np.ndarray, "s s 3"]:
        entry = self.entries[place]
        return decode(entry.read(entry.picture), self.pictures.largest)


def _cache(n: int, size: int) -> tuple[UInt8[np.ndarray, "n s s 3"], np.ndarray] | None:
    """Room for n pictures, and whether each is there yet; None if there is none to keep."""
    room = n * size * size * 3
    if room > CACHE_BYTES:
        log.warning("cache: %d pictures of %d px take %.1f GiB; not kept", n, size, room / 2**30)
        return None
    if not room:
        return None
    # Anonymous and shared: forked workers fill one cache between them.
    pixels = np.frombuffer(mmap.mmap(-1, room), np.uint8).reshape(n, size, size, 3)
    return pixels, np.frombuffer(mmap.mmap(-1, n), np.bool_)


def _fields(entry: Entry) -> dict[str, Any]:
    try:
        fields = json.loads(entry.read("json") or "{}")
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON") from error
    if not isinstance(fields, dict):
        raise BadSample("broken JSON")
    return fields


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Tensors stacked, `sample` an int64 tensor, `skipped` counted by reason, the rest lists."""
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        batch[key] = torch.stack(values) if isinstance(first, Tensor) else values
    batch["sample"] = torch.tensor(batch["sample"])
    batch["skipped"] = dict(Counter(reason for reasons in batch["skipped"] for reason in reasons))
    return batch


def put_rows(whole: dict[str, Tensor], part: Mapping[str, Tensor], start: int, count: int) -> None:
    """Puts rows into tensors of `count` rows, made on first use: no picture is held twice."""
    for key, rows in part.items():
        if key not in whole:
            whole[key] = rows.new_empty((count, *rows.shape[1:]))
        whole[key][start : start + len(rows)] = rows


class SampleNumbers(Sampler[list[int]]):
    """The batches of a rank: batch k has the numbers start + (k world + rank) batch + 0, 1, ...

    So the k-th batches of all ranks together are one block of the same global order for any world
    size. `batches=None`: without end, and without a length.
    """

    def __init__(
        self, batch: int, rank: int = 0, world: int = 1, start: int = 0, batches: int | None = None
    ):
        self.batch, self.batches = batch, batches
        self.first, self.stride = start + rank * batch, world * batch

    def __iter__(self) -> Iterator[list[int]]:
        for k in count() if self.batches is None else range(self.batches):
            first = self.first + k * self.stride
            yield list(range(first, first + self.batch))

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("endless")
        return self.batches


def loader(
    shards: Shards,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    batches: int | None = None,
    workers: int = 0,
) -> DataLoader:
    """Collated batches of `batch` samples for one rank, from global sample number `start` on."""
    return DataLoader(
        shards,
        batch_sampler=SampleNumbers(batch, rank, world, start, batches),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
