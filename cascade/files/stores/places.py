"""Places of files: paths on this machine's disks, and objects in stores, named alike.

A `Remote` has the names of a `Path` (parent, stem, ...), so that whoever joins names need not know
which one it was given. What reads and writes goes through the functions here.
"""

import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple
from urllib.parse import urlsplit

from cascade.errors import UserError
from cascade.files.atomic import matching, write_atomically
from cascade.files.stores import client

SCHEMES = ("s3", "gs", "az", "http", "https")


class Stat(NamedTuple):
    """A file's size and modification time, and in a store its ETag ("" on a disk)."""

    bytes: int
    mtime_ns: int
    version: str = ""


@dataclass(frozen=True)
class Remote:
    """An object of a store, or a prefix of objects.

    Attributes:
        url: without a slash at its end.
        known: its `Stat`, if it was found by listing its folder.
    """

    url: str
    known: Stat | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: "Remote") -> bool:
        return self.parts < other.parts

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.url.split("/"))

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return splitext(self.name)[1]

    @property
    def parent(self) -> "Remote":
        return Remote(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "Remote":
        return self.parent / name

    @property
    def is_listed(self) -> bool:
        """Whether its store can list objects; web servers cannot."""
        return not self.url.startswith("http")


Place = Path | Remote


def place(name: str | Place) -> Place:
    """Return the place that a user named: a URL of a store, or a path.

    Raises:
        UserError: the URL contains credentials, or no bucket or host.
    """
    if isinstance(name, Remote) or "://" not in str(name):
        return name if isinstance(name, Remote) else Path(name)
    found = urlsplit(str(name))
    if found.scheme not in SCHEMES:
        raise UserError(f"{found.scheme}://: unknown scheme; use one of {', '.join(SCHEMES)}")
    if found.query or found.username or found.password:
        raise UserError(
            f"{found.scheme}://{found.hostname}{found.path}: leave credentials and what follows ? "
            "out of the URL; they are read from the environment (README, On a cluster)"
        )
    if not found.netloc:
        raise UserError(f"{name}: name a bucket, as in {found.scheme}://BUCKET/FOLDER")
    return Remote(str(name).rstrip("/"))


def on_disk(name: str | Path, who: str) -> Path:
    """Return a path, for what does not read stores.

    Raises:
        UserError: the name is a URL.
    """
    if isinstance(place(name), Remote):
        raise UserError(f"{name}: {who} from a disk only: copy the shards that it needs there")
    return Path(name)


def stat_of(where: Place) -> Stat:
    """Return size, time and version of a file. Raises OSError as `Path.stat` does."""
    if isinstance(where, Remote):
        return where.known or Stat(*client.ask("stat", url=where.url)[0]["stat"])
    found = where.stat()
    return Stat(found.st_size, found.st_mtime_ns)


def as_known(where: Place, stat: Stat) -> Place:
    """Return the place with its `Stat`: what is read of it later must be of this version."""
    return replace(where, known=stat) if isinstance(where, Remote) else where


def exists(where: Place) -> bool:
    """Return whether there is a file (or on a disk, a folder)."""
    try:
        stat_of(where)
    except FileNotFoundError:
        return False
    return True


def files_of(folder: Place, ending: str = "") -> list[Place]:
    """Return the files of a folder with this ending, sorted by name.

    Raises:
        UserError: a web server, which lists nothing.
    """
    if not isinstance(folder, Remote):
        return sorted(path for path in folder.glob("*") if path.name.endswith(ending))
    if not folder.is_listed:
        raise UserError(
            f"{folder}: a web server does not list its files; index them where they lie, with "
            "`cascade data index DIR`, and copy dataset.json and *.index as well"
        )
    rows = client.ask("list", url=folder.url)[0]["files"]
    return sorted(
        Remote(f"{folder}/{name}", Stat(*stat)) for name, stat in rows if name.endswith(ending)
    )


def is_folder(where: Place) -> bool:
    """Return whether this is a folder; in a store, whether no tar and no pattern is named."""
    if not isinstance(where, Remote):
        return where.is_dir()
    return where.suffix != ".tar" and not {*"*?["} & {*where.name}


def matched(pattern: Place) -> list[Place]:
    """Return the files that match a glob, sorted; an existing file is never treated as a glob."""
    if not isinstance(pattern, Remote):
        return matching(pattern)
    if is_folder(pattern) or not {*"*?["} & {*pattern.name}:
        return [pattern]
    found = files_of(pattern.parent)
    if exact := [one for one in found if one == pattern]:
        return exact
    return [one for one in found if fnmatch.fnmatchcase(one.name, pattern.name)]


def in_order(places: Iterable[Place]) -> list[Place]:
    """Sort places by folder and name."""
    return sorted(places, key=lambda one: one.parts)


def read_bytes(where: Place) -> bytes:
    """Read a whole file. Raises OSError as `Path.read_bytes` does."""
    if not isinstance(where, Remote):
        return where.read_bytes()
    return client.ask("read", url=where.url)[1]


def write(where: Place, make: Callable[[Path], None]) -> None:
    """Write a file so that it appears whole or not at all; `make` writes it at the path given."""
    if not isinstance(where, Remote):
        write_atomically(where, make)
        return
    handle, name = tempfile.mkstemp(prefix="cascade-")
    os.close(handle)
    try:
        make(Path(name))
        _put(where.url, Path(name))
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(where: Place, text: str) -> None:
    """Write a file of text; see `write`."""
    write(where, lambda path: path.write_text(text) and None)


def upload(folder: Path, out: Remote, last: str) -> None:
    """Copy the files of a local folder into a store, the one named `last` at the end.

    So whoever finds that one finds all.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    for path in sorted(files, key=lambda path: (path.name == last, path)):
        name = path.relative_to(folder).as_posix()
        _put(f"{out.url}/{name}", path)


def _put(url: str, path: Path) -> None:
    try:
        client.ask("put", url=url, file=str(path.absolute()))
    except FileNotFoundError as error:
        raise UserError(f"{url}: there is no such bucket: create it, or name another") from error
