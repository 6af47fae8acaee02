"""Training samples from object stores and pipes: tars drawn with replacement, read front to back.

For data that cannot be indexed. Items and sample numbers are those of `Shards`: all ranks and
workers together use each number once, and it determines the crop and the caption. But which sample
gets which number is not reproducible: a resumed run draws others. Samples are assembled within a
tar, and a tar's end marker shows that it is complete, so no picture meets another one's caption.
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import webdataset

from cascade.data.embeddings import Embeddings
from cascade.data.items import MAX_BAD_IN_A_ROW, Items, Skip
from cascade.data.tars.index import counted
from cascade.data.tars.keys import FIRST_DOT, check_rule
from cascade.data.tars.urls import Streamed, named, streamed
from cascade.data.transforms import BadSample, Pictures
from cascade.draws import generator
from cascade.errors import UserError
from cascade.files.stores.places import Place

MAX_EMPTY_TARS = 20  # tars in a row without a usable sample after which reading is given up


class Stream:
    """The samples of tars that are read sequentially, without end. These are `Samples`.

    Args:
        urls: what `webdataset` opens: http://, https://, gs://, hf://, ..., pipe:COMMAND, a file;
            braces expand to several: train-{00000..00099}.tar.
        pictures, captions, seed, json_fields, max_skip_fraction, several, recaptions: as for
            `Shards`.
        allow_pipe: whether pipe:COMMAND may run in a shell. Set it on the command line only, never
            in a file that came with the data.
        split: selects tars by name (`splits.of_split`).
        keys: where the key ends in a member's name (`cascade.data.tars.keys`).
        shuffle: False reads the tars once, in order.
        buffer: how many samples, as undecoded files, each worker shuffles together.
        embeddings: precomputed folders, joined by the names of the tars.

    Raises:
        UserError: a URL that cannot or may not be opened, two tars of one name, no tar of the
            split.
    """

    samples_per_epoch, held_out, alike = math.inf, 0.0, 0

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
        recaptions: str | Place | None = None,
    ):
        check_rule(keys)
        self.make_item = Items(
            pictures, captions, embeddings, json_fields, seed, several, recaptions
        )
        self.seed, self.shuffle, self.buffer = seed, shuffle, buffer
        self.embeddings, self.max_skip_fraction = self.make_item.stores, max_skip_fraction
        self.urls, self.keys = named(urls, split, allow_pipe), keys
        for store in self.embeddings:
            store.require(list(self.urls))

    def items(
        self, numbers: Iterable[int], part: int = 0, parts: int = 1, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield an item for each sample number.

        Args:
            part, parts: which of the stream's readers this one is: it gets each `parts`-th tar.
            start: selects the sequence of tars, so that a resumed run does not repeat the first.

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
                    if len(bad) >= MAX_BAD_IN_A_ROW:
                        reasons = counted(reason for _, reason in bad)
                        raise UserError(f"no good sample from {bad[0][0]} on ({reasons})") from None
                else:
                    yield {**item, "skipped": [Skip(n, *one) for one in bad]}
                    bad.clear()
                    break
            else:
                return

    def preview(self, count: int, sizes: Sequence[int]) -> tuple[()]:
        """Return nothing: a stream has no random access."""
        return ()

    def check(self, batch: int) -> None:
        """Check nothing: any look at a stream would download tars."""

    def provenance(self) -> dict[str, Any]:
        """Return that nothing identifies the samples, whose order is not reproducible."""
        return {"shards": None, "content": None, "held_out": self.held_out}

    def _samples(
        self, part: int, parts: int, start: int, bad: list[tuple[str, str]]
    ) -> Iterator[Streamed]:
        if not self.shuffle:
            return self._read(islice(self.urls, part, None, parts), bad)
        seed = int(generator(self.seed, "stream", start).integers(2**31))
        # All readers draw the same sequence of tars and take turns. By default webdataset seeds by
        # the rank in the environment, which a spawned worker does not have.
        drawn = webdataset.ResampledShards(  # draws indices: in names it would expand braces
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
        """Yield the samples of these tars that have a picture and a caption."""
        empty, total = 0, 0
        for name in names:
            before = total
            for sample in streamed(name, self.urls[name], bad, self.keys):
                total += 1
                yield sample
            empty = empty + 1 if total == before else 0
            if empty == MAX_EMPTY_TARS:
                break
        if empty and (empty == MAX_EMPTY_TARS or not total):
            reasons, url = counted(reason for _, reason in bad), self.urls[name]
            raise UserError(f"no usable sample in {empty} tars in a row ({reasons}): check {url}")
