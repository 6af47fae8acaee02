"""Training samples from object stores and pipes: tars drawn with replacement, read front to back.

For what cannot be indexed. Items are those of `Shards`, and so are their numbers: no two of them
have the same, for any ranks and workers, and crops and captions are drawn by them. But which sample
gets which number is not kept: a run that goes on from a checkpoint draws tars anew. A picture
never meets another's caption: samples are made within a tar, whose end shows that it is whole.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from cascade.data import shards
from cascade.data.embeddings import Embeddings
from cascade.data.index import counted
from cascade.data.items import Items
from cascade.data.keys import FIRST_DOT, check_rule
from cascade.data.shards import PATIENCE, Loader, SampleNumbers, Shards, Skip, collate
from cascade.data.transforms import BadSample, Pictures
from cascade.data.urls import Streamed, named, streamed
from cascade.draws import generator
from cascade.errors import UserError

BARREN = 20  # tars in a row without a sample, and nobody waits for the next one


class Stream:
    """The samples of tars that are read as they come, without end.

    Args:
        urls: what `webdataset` opens: http://, https://, gs://, hf://, ..., pipe:COMMAND, a file;
            braces stand for several: train-{00000..00099}.tar.
        pictures, captions, seed, json_fields, max_skip_fraction, several: as for `Shards`.
        allow_pipe: whether pipe:COMMAND is run by a shell: for the command line to say, never for
            a file that came with the data.
        split: what `splits.of_split` finds by name.
        keys: where a key ends in a name (`cascade.data.keys`).
        shuffle: False reads the tars once, in order.
        buffer: how many samples are shuffled together, in each worker, as undecoded files.
        embeddings: precomputed folders, joined by the names of the tars.

    Raises:
        UserError: a URL that cannot or may not be opened, two tars of one name, none of the split.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        pictures: Pictures,
        allow_pipe: bool,
        split: str = "train",
        captions: Mapping[str, float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 1000,
        embeddings: Mapping[str, Embeddings] | None = None,
        json_fields: Sequence[str] = (),
        max_skip_fraction: float = 0.01,
        keys: str = FIRST_DOT,
        several: str | None = None,
    ):
        check_rule(keys)
        self.make_item = Items(pictures, captions, embeddings, json_fields, seed, several)
        self.seed, self.shuffle, self.buffer = seed, shuffle, buffer
        self.embeddings, self.max_skip_fraction = self.make_item.embeddings, max_skip_fraction
        self.urls, self.keys = named(urls, split, allow_pipe), keys
        for store in self.embeddings:
            store.require(list(self.urls))

    def items(
        self, numbers: Iterable[int], part: int = 0, parts: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """An item for each number, as those of `Shards`.

        Args:
            part, parts: of all readers of one stream, which one: it gets each `parts`-th tar drawn.
            start: another one draws other tars.

        Raises:
            UserError: nothing but bad samples.
        """
        bad: list[tuple[str, str]] = []  # "shard/key" and reason, since the last good one
        samples = self._samples(part, parts, start, bad)
        for n in numbers:
            for sample in samples:
                try:
                    item = self.make_item(sample, n)
                except BadSample as reason:
                    bad.append((f"{sample.shard}/{sample.key}", str(reason)))
                    if len(bad) >= PATIENCE:
                        reasons = counted(Counter(reason for _, reason in bad))
                        raise UserError(f"no good sample from {bad[0][0]} on ({reasons})") from None
                else:
                    yield {**item, "skipped": [Skip(n, *one) for one in bad]}
                    bad.clear()
                    break
            else:
                return

    def _samples(
        self, part: int, parts: int, start: int, bad: list[tuple[str, str]]
    ) -> Iterator[Streamed]:
        if not self.shuffle:
            return self._read(islice(self.urls, part, None, parts), bad)
        seed = int(generator(self.seed, "stream", start).integers(2**31))
        # All parts draw the same tars, and take turns. By itself webdataset would ask the
        # environment for the rank, which a spawned worker does not know.
        drawn = webdataset.ResampledShards(  # of numbers: it would expand braces in names
            [str(i) for i in range(len(self.urls))],
            seed=seed,
            worker_seed=lambda: 0,
            deterministic=True,
        )
        names = list(self.urls)
        mine = (names[int(source["url"])] for source in islice(drawn, part, None, parts))
        rng = random.Random(seed + part)
        return webdataset.shuffle(self.buffer, rng=rng)(self._read(mine, bad))

    def _read(self, names: Iterable[str], bad: list[tuple[str, str]]) -> Iterator[Streamed]:
        """The samples of these tars that have a picture and a caption."""
        barren, total = 0, 0
        for name in names:
            before = total
            for sample in streamed(name, self.urls[name], bad, self.keys):
                total += 1
                yield sample
            barren = barren + 1 if total == before else 0
            if barren == BARREN:
                break
        if barren and (barren == BARREN or not total):
            reasons, url = counted(Counter(reason for _, reason in bad)), self.urls[name]
            raise UserError(f"no usable sample in {barren} tars in a row ({reasons}): check {url}")


def loader(
    data: Shards | Stream,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    batches: int | None = None,
    workers: int = 0,
) -> Loader:
    """Collated batches for one rank, from global sample number `start` on, indexed or streamed."""
    if isinstance(data, Shards):
        return shards.loader(data, batch, rank, world, start, batches, workers)
    numbers = SampleNumbers(batch, rank, world, start, batches)
    return Loader(
        _Share(data, numbers, rank, world, start),
        batch_size=batch,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class _Share(IterableDataset):
    """What one rank reads; of its batches worker w of W makes the w-th, (w + W)-th, ..."""

    stream: Stream
    numbers: SampleNumbers
    rank: int
    world: int
    start: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        w, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = chain.from_iterable(islice(self.numbers, w, None, workers))
        part = self.rank * workers + w
        return self.stream.items(numbers, part, self.world * workers, self.start)
