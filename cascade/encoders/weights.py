"""Files of models: the hash of weights, whether they fit a network, and why one is refused.

Weights come from others: safetensors, or files that torch loads with `weights_only`. No code in
them is ever run.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from cascade.errors import UserError
from cascade.formats.kinds import CUT_ZIP, PICKLE, SAFETENSORS, TORCH, kind_of
from cascade.formats.texts import brief, read


class NotHere(UserError):
    """Files of a model are not on this machine."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file is damaged."""
    try:
        found = json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return found


def weights_hash(files: Iterable[Path]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the concatenated files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def tensors_hash(tensors: Mapping[str, Tensor], about: bytes = b"") -> str:
    """The first 16 hexadecimal digits of the SHA-256 of named tensors, after some more bytes."""
    digest = hashlib.sha256(about)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def reading(weights: Sequence[Path], whose: str) -> Iterator[None]:
    """Turns a loader's errors into UserErrors that name the file at fault.

    The loader itself must run no code of the weights.

    Raises:
        UserError: the loader raised; the message says what is wrong with which file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for path in weights:
            if found := fault(path):
                raise UserError(f"{path} cannot be read as weights of {whose}: {found}") from error
        names, reason = ", ".join(map(str, weights)), " ".join(str(error).split())[:300]
        raise UserError(
            f"{names} cannot be read as weights of {whose}: {type(error).__name__}: {reason}"
        ) from error


def some_of(
    file: Path, wanted: Callable[[str], bool], shapes: Mapping[str, list[int]]
) -> dict[str, Tensor] | None:
    """Reads the wanted tensors of a safetensors file, and no others.

    They are copied, since results depend on how memory is aligned, which in the file is arbitrary.

    Returns:
        None if they do not have just these names and shapes.
    """
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if wanted(name)]  # noqa: SIM118
        if {name: opened.get_slice(name).get_shape() for name in names} != shapes:
            return None
        return {name: opened.get_tensor(name).clone() for name in names}


def fault(path: Path) -> str | None:
    """What is wrong with a file of weights, and what to do; None if it looks sound."""
    try:
        kind = kind_of(path)
    except OSError as error:
        return f"{error.strerror}: give a file that can be read"
    if path.suffix == ".safetensors" and kind in (SAFETENSORS, None):
        return _fault_of_safetensors(path)
    if kind == SAFETENSORS and path.suffix != ".safetensors":
        return "it is a safetensors file: give it the ending .safetensors"
    if kind not in (CUT_ZIP, PICKLE, TORCH):
        return f"it is {kind or 'no file of weights'}: fetch the file itself"
    if path.suffix == ".safetensors":
        return "it is a pickle or an archive of torch, not safetensors: convert it"
    return _fault_of_pickle(path, kind)


def _fault_of_safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return "it is cut short, or no safetensors file: fetch it again"
        try:
            entries = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "its header is damaged: fetch it again"
    if size < whole:
        return f"it is cut short ({size:,} of {whole:,} bytes): fetch it again"
    return None


def _fault_of_pickle(path: Path, kind: str) -> str | None:
    if kind == CUT_ZIP:
        return "it is cut short or damaged: fetch it again"
    if kind == TORCH:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return (
                    "it is a TorchScript archive, as OpenAI publishes its CLIPs, which is a "
                    "program and is not run: give the same weights as safetensors"
                )
    if code := _code(path):
        names = ", ".join(map(brief, code[:3]))
        return f"it would run {names}: give the weights as safetensors"
    if kind == PICKLE:
        return "it is a pickle that cannot be read safely: give the weights as safetensors"
    return None


def _code(path: Path) -> list[str]:
    """The names that unpickling a torch checkpoint would call, found without unpickling it."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no archive that torch wrote
        return []


def tensors_of(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of files by name, for their shapes and dtypes; no data is read into memory."""
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    kind = torch.float32 if "F" in part.get_dtype() else torch.int64
                    found[name] = torch.empty(part.get_shape(), dtype=kind, device="meta")
        else:
            found |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return found


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Reads a file of torch's, of any age, without running code in it."""
    return torch.load(path, map_location="cpu", weights_only=True)


def check_tensors(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str, whose: str
) -> None:
    """Checks that weights fit a network: the same names, each of the same shape.

    Any floating-point dtype fits, as it is converted.

    Raises:
        UserError: names what is missing, unexpected, or of another shape or type.
    """
    wrong = [
        f"{key} is {_about(theirs[key])}, not {_about(value)}"
        for key, value in own.items()
        if key in theirs and not _fits(theirs[key], value)
    ]
    missing = [key for key in own if key not in theirs]
    over = [key for key in theirs if key not in own]
    found = [_some(wrong, "")] if wrong else []
    found += [f"it lacks {_some(missing, ' tensors')}"] if missing else []
    found += [f"it has besides {_some(over, ' tensors')}"] if over else []
    if found:
        raise UserError(
            f"{where} does not hold the weights of {whose}: {'; '.join(found)}; give the model and "
            "the weights that belong together"
        )


def _some(names: Collection[str], what: str) -> str:
    more = f" (and {len(names) - 1} more{what})" if len(names) > 1 else ""
    return f"{next(iter(names))}{more}"


def _fits(theirs: Tensor, own: Tensor) -> bool:
    numbers = theirs.is_floating_point() or not own.is_floating_point()
    return theirs.shape == own.shape and numbers


def _about(x: Tensor) -> str:
    return f"{list(x.shape)}{'' if x.is_floating_point() else ' of whole numbers'}"
