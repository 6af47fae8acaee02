"""Stored features of a set of pictures: all rows, or their moments.

Both record their `Origin`: the extractor, its weights and resizing, and the set. Features of
different extractors are never combined. Files are written atomically and read without unpickling.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cascade.errors import UserError
from cascade.eval.metrics.distances import frechet
from cascade.eval.metrics.features import Features
from cascade.files.atomic import write_atomically
from cascade.formats.kinds import NPZ, kind_of
from cascade.formats.texts import brief


def warnings_for(count: int, dim: int) -> list[str]:
    """Warnings about a distance of `count` pictures in `dim` dimensions."""
    found = []
    if count < 10_000:
        found.append("fewer than 10,000 pictures")
    if count < dim:
        found.append("fewer pictures than the feature dimension")
    return found


@dataclass(frozen=True)
class Origin:
    """Where features come from; fields are empty if unknown.

    Attributes:
        extractor: its name.
        hash: of its weights.
        resize: how it resizes pictures, in words.
        pictures: hash of the set of pictures.
        former: the same origin as an earlier version recorded it, if that differs.
    """

    extractor: str = ""
    hash: str = ""
    resize: str = ""
    pictures: str = ""
    former: "Origin | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, features: Features, pictures: str) -> "Origin":
        known = getattr(features, "former", None)
        former = known and cls(*known, features.resize, pictures)
        return cls(features.name, features.hash, features.resize, pictures, former)

    @property
    def words(self) -> dict[str, str]:
        """The fields that files record."""
        return {name: getattr(self, name) for name in _WORDS}

    @property
    def names(self) -> list["Origin"]:
        """This origin, and the one that an earlier version recorded for it."""
        return [self, *([self.former] if self.former else [])]

    def same_features(self, other: "Origin") -> bool:
        """Whether weights and resizing are equal; names of one network may differ."""
        return any(
            (a.hash, a.resize) == (b.hash, b.resize) for a in self.names for b in other.names
        )


_WORDS = ("extractor", "hash", "resize", "pictures")


@dataclass(frozen=True)
class Moments:
    """Mean and unbiased covariance of n rows of features; n is None if it is unknown."""

    mean: Float64[Tensor, " d"]
    cov: Float64[Tensor, "d d"]
    n: int | None
    origin: Origin

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], origin: Origin) -> "Moments":
        """The moments of rows. UserError if there are none, or some are not finite."""
        x = rows.detach().double()
        if not len(x) or not x.isfinite().all():
            raise UserError("there are no features, or not all are finite: check the pictures")
        mean = x.mean(0)
        scatter = (x - mean).T @ (x - mean)
        return cls(mean, scatter / max(len(x) - 1, 1), len(x), origin)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together (Chan et al. 1979).

        Raises:
            UserError: their origins differ, or a number of rows is unknown.
        """
        if self.origin != other.origin or None in (self.n, other.n):
            raise UserError("moments of different origins, or of unknown counts, cannot be added")
        n, step = self.n + other.n, other.mean - self.mean
        scatter = (self.n - 1) * self.cov + (other.n - 1) * other.cov
        scatter += torch.outer(step, step) * (self.n * other.n / n)
        return Moments(self.mean + step * (other.n / n), scatter / (n - 1), n, self.origin)

    def check(self, features: Features) -> list[str]:
        """Warnings about using these moments with such features.

        Raises:
            UserError: they are of another extractor, other weights or another resizing.
        """
        if len(self.mean) != features.dim:
            raise UserError(
                f"the statistics have {len(self.mean)} dimensions and {features.name} "
                f"{features.dim}: make them again with the same extractor"
            )
        if not self.origin.hash:
            return [f"statistics of an unknown extractor, taken to be {features.name}"]
        if not self.origin.same_features(Origin.of(features, "")):
            raise UserError(
                f"the statistics are of {self.origin.extractor}, {self.origin.resize}, and not of "
                f"{features.name}, {features.resize}: make them again with the same extractor"
            )
        return []

    def frechet(self, other: "Moments") -> float:
        """The Fréchet distance. UserError if both are known to be of different extractors."""
        a, b = self.origin, other.origin
        if len(self.mean) != len(other.mean) or (a.hash and b.hash and not a.same_features(b)):
            raise UserError(
                f"statistics of {a.extractor}, {a.resize}, do not compare with those of "
                f"{b.extractor}, {b.resize}: make both with one extractor"
            )
        return frechet(self.mean, self.cov, other.mean, other.cov)

    def save(self, path: Path) -> None:
        """Writes an .npz that pytorch-fid and clean-fid can also read."""
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        about = {key: np.array(value) for key, value in self.origin.words.items()}
        count = {} if self.n is None else {"n": np.array(self.n)}

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                np.savez(file, **arrays, **about, **count)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Reads a file of `save`, pytorch-fid or clean-fid; the latter two record no extractor.

        Raises:
            UserError: the file is missing, or holds no mean and covariance.
        """
        found = _arrays(path, ["mu", "sigma", "n", *_WORDS])
        names = {key: str(found[key]) for key in _WORDS if key in found}
        mean, cov = found.get("mu"), found.get("sigma")
        if mean is None or cov is None:
            raise UserError(f"{path} has no mu and sigma{_instead(path)}")
        if (
            mean.ndim != 1
            or cov.shape != 2 * mean.shape
            or mean.dtype.kind + cov.dtype.kind != "ff"
        ):
            raise UserError(f"{path}: mu {mean.shape} and sigma {cov.shape} are no moments")
        mean, cov = mean.astype(np.float64), cov.astype(np.float64)
        scale = np.abs(cov).max(initial=0)
        sound = np.isfinite(mean).all() and np.isfinite(scale) and (cov.diagonal() >= 0).all()
        if not sound or np.abs(cov - cov.T).max(initial=0) > 1e-5 * scale:
            raise UserError(f"{path} is damaged: sigma is no covariance; make it again")
        n = _count(path, found["n"]) if "n" in found else None
        return cls(torch.from_numpy(mean), torch.from_numpy((cov + cov.T) / 2), n, Origin(**names))


def _arrays(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays under these keys, if present; others (ADM's files hold pictures) are not read."""
    try:
        if (kind := kind_of(path)) != NPZ:
            raise UserError(
                f"{path} is {kind or 'no file of arrays'}: give statistics as mu and sigma in an "
                ".npz (numpy.savez)"
            )
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if key in keys}
    except FileNotFoundError:
        raise UserError(f"no statistics at {path}: give an .npz file") from None
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds on damaged archives
        raise UserError(f"{path} is not a sound .npz file: make it again") from error


def _count(path: Path, n: np.ndarray) -> int:
    """The number of pictures, which other programs may write as an array or a float."""
    value = float(n.item()) if n.size == 1 and n.dtype.kind in "iuf" else 0.0
    if value < 1 or not value.is_integer():
        raise UserError(f"{path}: n={brief(n)} is no number of pictures: make it again")
    return int(value)


def _instead(path: Path) -> str:
    """The end of an error message: what a file holds instead of statistics, and what to do."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    held = brief(", ".join(sorted(names)[:5]), 200)
    if "arr_0" in names:
        return f" but {held}: if these are pictures, as of ADM's samples, save each as a PNG file"
    return f" but {held}: give statistics of pytorch-fid's format"


def cached_rows(
    folder: Path,
    origin: Origin,
    ids: Sequence[int],
    dim: int,
    compute: Callable[[], Iterable[Float[Tensor, "b d"]]],
) -> Float[Tensor, "n d"]:
    """The float32 features of the pictures with these ids, in that order, memory mapped.

    They are computed once for each extractor, resizing, set of pictures and list of ids. Each such
    combination has its own subfolder, so that features of two protocols are never mixed up.

    Args:
        compute: yields the rows batch by batch; called only if no file has them.

    Raises:
        UserError: the file is damaged, or `compute` gave another number of rows, or rows that are
            not finite.
    """
    numbers = np.asarray(ids, dtype=np.int64)
    rows = {"dim": dim, "count": len(numbers)}
    rows["ids"] = hashlib.sha256(numbers.tobytes()).hexdigest()
    for name in origin.names[::-1]:  # ends with its own name, if no folder exists
        text = json.dumps({**name.words, **rows}, indent=2) + "\n"
        place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if place.is_dir():
            break

    def write(part: Path) -> None:
        part.mkdir()
        (part / "protocol.json").write_text(text)
        np.save(part / "ids.npy", numbers)
        _write_rows(part / "features.npy", (len(numbers), dim), compute())

    if not place.is_dir():
        try:
            write_atomically(place, write)
        except OSError:
            if not place.is_dir():  # else another process wrote it first
                raise
    return _read_rows(place, text, (len(numbers), dim))


def _write_rows(path: Path, shape: tuple[int, int], batches: Iterable[Tensor]) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for rows in batches:
        stop = start + len(rows)
        if stop > len(out) or not rows.isfinite().all():
            raise UserError(
                f"features of {len(out)} pictures are not finite, or too many: check the pictures"
            )
        out[start:stop] = rows.float().cpu().numpy()
        start = stop
    if start < len(out):
        raise UserError(f"only {start} of {len(out)} pictures have features: check the pictures")
    out.flush()


def _read_rows(place: Path, text: str, shape: tuple[int, int]) -> Float[Tensor, "n d"]:
    try:
        sound = (place / "protocol.json").read_text() == text
        # Copy on write, since torch refuses read-only arrays.
        rows = np.load(place / "features.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is damaged: remove it") from error
    if not sound or rows.shape != shape or rows.dtype != np.float32:
        raise UserError(f"{place} is damaged: remove it")
    return torch.from_numpy(rows)
