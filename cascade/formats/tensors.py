"""Rows of a safetensors file in a store, by byte ranges; `safe_open` reads those on a disk."""

import json
import math

import torch
from torch import Tensor

from cascade.files.stores.reading import Ranges

_MAX_HEADER = 10**8  # bytes, as in safetensors itself
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class RangedTensors:
    """The tensors of a file, with the methods of `safe_open` that `Embeddings` uses.

    Raises:
        ValueError, TypeError, KeyError: the file is damaged.
    """

    def __init__(self, ranges: Ranges):
        size = int.from_bytes(ranges.pread(8, 0), "little")
        if not 0 < size <= min(_MAX_HEADER, ranges.stat.bytes - 8):
            raise ValueError("no header")
        about = json.loads(ranges.pread(size, 8))
        self._metadata = about.pop("__metadata__")
        self._slices = {name: _Slice(ranges, 8 + size, **of) for name, of in about.items()}

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._slices)

    def get_slice(self, name: str) -> "_Slice":
        return self._slices[name]

    def get_tensor(self, name: str) -> Tensor:
        return self._slices[name][:]


class _Slice:
    """A tensor that is read by rows. Arguments: those of the file's header."""

    def __init__(
        self, ranges: Ranges, base: int, dtype: str, shape: list[int], data_offsets: list[int]
    ):
        start, end = data_offsets
        self._ranges, self._dtype, self._shape = ranges, _DTYPES[dtype], shape
        self._start, self._row = base + start, math.prod(shape[1:]) * self._dtype.itemsize
        whole = min(shape, default=0) >= 0 and end - start == shape[0] * self._row
        if not (whole and start >= 0 and base + end <= ranges.stat.bytes):
            raise ValueError("a tensor of another size")

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, rows: int | slice) -> Tensor:
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        first, end, _ = rows.indices(self._shape[0])
        data = self._ranges.pread((end - first) * self._row, self._start + first * self._row)
        shape = (end - first, *self._shape[1:])
        if not data:
            return torch.empty(shape, dtype=self._dtype)
        return torch.frombuffer(bytearray(data), dtype=self._dtype).view(shape)
