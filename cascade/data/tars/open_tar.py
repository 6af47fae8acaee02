"""An open tar, and a sample of it: the members of one key, read by their places in the index."""

from collections import Counter
from collections.abc import Set
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from cascade.data.tars import index as indexes
from cascade.data.tars.index import Index
from cascade.data.tars.keys import key_and_extension
from cascade.data.tars.splits import ALL
from cascade.data.tars.tar import WRONG_SIZE, contents, filled, is_whole
from cascade.data.transforms import BadSample
from cascade.errors import explained
from cascade.files.stores.cache import Cache
from cascade.files.stores.reading import LocalRanges, opened

NEAR = 2**20  # bytes of a sample that are read at once


class OpenTar:
    """The samples of a part of one tar that have one of the captions, by places 0, 1, ..."""

    def __init__(
        self,
        index: Index,
        captions: Set[str],
        part: str = ALL,
        share: float = 0.0,
        cache: Cache | None = None,
    ):
        self.shard, self._index = index.tar.stem, index
        self._given = index, captions, part, share, cache
        self._rows = index.usable(captions, part, share)
        self._near = (-1, 0, b"")  # the sample of a store that was read last: place, offset, bytes
        with explained(f"cannot read {index.tar}"):
            self._ranges = opened(index.tar, cache)

    def __reduce__(self):  # open files cannot be sent to workers
        return OpenTar, self._given

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sides(self) -> Int32[np.ndarray, "n 2"] | None:
        """Height and width of each picture, upright; 0 if its header is broken; None if unread."""
        return None if self._index.sides is None else self._index.sides[self._rows]

    def key(self, place: int) -> str:
        return self._index.key(int(self._rows[place]))

    def read(self, place: int, member: str) -> bytes:
        """Return the bytes of "picture", "txt" or "json", b"" if absent.

        Any other extension, such as "depth.png", is that of a further file of the sample. The index
        does not hold these, so the tar's headers are read once.

        Raises:
            BadSample: the tar cannot be read there, the member exceeds `index.LIMITS`, or its size
                in the header is wrong.
        """
        if member in indexes.MEMBERS:
            column = indexes.MEMBERS.index(member)
            offset, size = self._index.spans[self._rows[place], column].tolist()
        else:
            offset, size = self._columns.get((self.key(place), member), (0, 0))
        if not 0 <= size <= indexes.LIMITS.get(member, indexes.LIMITS["picture"]):
            raise BadSample("huge file")
        try:
            blocks = self._bytes(place, offset, filled(size)) if size else b""
        except OSError as error:
            raise BadSample("cannot be read") from error
        data = blocks[:size]
        if len(data) < size:
            raise BadSample("cannot be read")
        if not is_whole(blocks, size):
            raise BadSample(WRONG_SIZE)
        return data

    @cached_property
    def _columns(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Offset and size of each file of the tar whose key and extension occur once."""
        members = contents(self._index.tar).members
        named = [(key_and_extension(one.name, self._index.keys), one) for one in members]
        times = Counter(name for name, _ in named)
        return {name: (one.offset, one.bytes) for name, one in named if times[name] == 1}

    def _bytes(self, place: int, offset: int, size: int) -> bytes:
        """Read a range; in a store with the sample's other members, which are asked for next."""
        if isinstance(self._ranges, LocalRanges):
            return self._ranges.pread(size, offset)
        if place != self._near[0]:
            spans = self._index.spans[self._rows[place]]
            there = spans[spans[:, 1] > 0]
            start, end = int(there[:, 0].min()), max(at + filled(n) for at, n in there.tolist())
            near = start >= 0 and 0 < end - start <= NEAR
            self._near = place, start, self._ranges.pread(end - start, start) if near else b""
        _, start, data = self._near
        if 0 <= offset - start <= len(data) - size:
            return data[offset - start : offset - start + size]
        return self._ranges.pread(size, offset)


class Placed(NamedTuple):
    """A sample of an open tar."""

    tar: OpenTar
    place: int

    @property
    def shard(self) -> str:
        return self.tar.shard

    @property
    def key(self) -> str:
        return self.tar.key(self.place)

    def read(self, member: str) -> bytes:
        """Read a member, as `OpenTar.read` does."""
        return self.tar.read(self.place, member)
