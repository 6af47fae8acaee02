"""TorchScript archives, read as data: their tensors, and the types of their modules.

OpenAI publishes its CLIPs as such archives. An archive is a zip file with a pickle of objects, the
storages of the tensors, and code. The pickle is interpreted here: its operations build plain
values, and names of classes and functions remain names. Nothing is imported or called, and none of
the code is run.
"""

import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade.errors import UserError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_MARK = object()


class Archive(NamedTuple):
    """What an archive holds.

    Attributes:
        tensors: by name.
        types: the qualified class names of modules, by path.
        code: reads its code, in parts.
    """

    tensors: dict[str, Tensor]
    types: dict[str, str]
    code: Callable[[], Iterator[bytes]]


@dataclass
class _Object:
    """An instance of a class that stays a name, with its attributes."""

    type: str
    state: dict[str, Any] = field(default_factory=dict)


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    return (
        path.is_file() and zipfile.is_zipfile(path) and _member(path, "constants.pkl") is not None
    )


def _member(path: Path, name: str) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    return next((one for one in names if one.count("/") == 1 and one.endswith(f"/{name}")), None)


def read_archive(path: Path) -> Archive:
    """Reads an archive.

    Raises:
        UserError: it is damaged, or its pickle does anything but describe modules and tensors.
    """
    place = _member(path, "data.pkl")
    if place is None:
        raise UserError(f"{path} is no TorchScript archive: give the file that was published")
    root = place.removesuffix("data.pkl")
    try:
        with zipfile.ZipFile(path) as archive:
            top = _interpreted(archive.read(place), _Storages(archive, f"{root}data/"))
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:  # a damaged archive fails anywhere
        raise UserError(f"{path} is damaged ({type(error).__name__}): fetch it again") from error
    tensors: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    _collect(top, "", tensors, types)

    def code() -> Iterator[bytes]:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(f"{root}code/") and name.endswith(".py"):
                    yield archive.read(name)

    return Archive(tensors, types, code)


def _collect(node: Any, path: str, tensors: dict[str, Tensor], types: dict[str, str]) -> None:
    if isinstance(node, Tensor):
        tensors[path] = node
    elif isinstance(node, _Object):
        types[path] = node.type
        for name, value in node.state.items():
            _collect(value, f"{path}.{name}" if path else name, tensors, types)


@dataclass
class _Storages:
    archive: zipfile.ZipFile
    root: str
    read: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, reference: Any) -> Tensor:
        """A storage, by its reference: ("storage", class, key, device, number of elements)."""
        _, kind, key, _, _ = reference
        if key not in self.read:
            dtype = _DTYPES.get(str(kind).rpartition(".")[2])
            if dtype is None:
                raise UserError(f"holds numbers of the type {kind}: give the published file")
            data = bytearray(self.archive.read(f"{self.root}{key}"))
            empty = torch.empty(0, dtype=dtype)
            self.read[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self.read[key]


def _rebuilt(arguments: tuple) -> Tensor:
    storage, offset, size, stride = arguments[:4]
    return torch.as_strided(storage, size, stride, offset).clone()


def _interpreted(data: bytes, storages: _Storages) -> Any:
    """The value that a pickle describes."""
    machine = _Machine(storages)
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "STOP":
            break
        machine.step(operation.name, argument)
    return machine.stack[-1]


class _Machine:
    """The stack machine of pickle, without classes and calls."""

    def __init__(self, storages: _Storages):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def step(self, name: str, argument: Any) -> None:
        constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
        makers = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
        if name in constants:
            self.stack.append(constants[name])
        elif name in makers:
            self.stack.append(makers[name]())
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "GLOBAL":
            self.stack.append(argument.replace(" ", "."))
        elif name.startswith(("BININT", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")):
            self.stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "BINPERSID":
            self.stack.append(self.storages(self.stack.pop()))
        elif name.startswith("TUPLE"):
            parts = self.marked() if name == "TUPLE" else self.popped(int(name[5:]))
            self.stack.append(tuple(parts))
        elif name != "PROTO":
            self.build(name)

    def build(self, name: str) -> None:
        """The operations that put values into others."""
        if name in ("NEWOBJ", "REDUCE"):
            kind, arguments = self.popped(2)
            tensor = name == "REDUCE" and kind == _REBUILD
            self.stack.append(_rebuilt(arguments) if tensor else _Object(kind))
        elif name == "BUILD":
            state = self.stack.pop()
            if isinstance(self.stack[-1], _Object) and isinstance(state, dict):
                self.stack[-1].state = state
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self.popped(2) if name == "SETITEM" else self.marked()
            self.stack[-1].update(zip(pairs[::2], pairs[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = self.popped(1) if name == "APPEND" else self.marked()
            self.stack[-1].extend(items)
        elif name != "PROTO":
            raise UserError(
                f"has a pickle with {name}, unlike any archive: give the published file"
            )

    def popped(self, count: int) -> list[Any]:
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found
