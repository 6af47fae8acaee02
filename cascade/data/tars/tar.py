"""The only reader of tars: which files a tar holds, where their bytes are, whether it is complete.

A tar ends with a block of zeros, followed only by padding zeros; `tarfile` alone would also accept
a damaged header as the end. A link is read as the file in the same tar that it points to.
Compressed tars are refused: they have no random access, and a kilobyte could become a gigabyte.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from posixpath import dirname, join, normpath
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from cascade.errors import UserError, explained
from cascade.files.stores import places
from cascade.files.stores.places import Place, Stat, place
from cascade.files.stores.reading import as_file, opened
from cascade.formats.kinds import COMPRESSED

MAX_HEADER = 2**20  # bytes of an extended header, which tarfile reads into memory
BROKEN = (OSError, tarfile.TarError, ValueError, RecursionError)  # what damaged tars raise

LINK = "link to no file of the tar"
STREAMED_LINK = "link, which a stream cannot follow"
HARD_LINK = f"hard {STREAMED_LINK}"  # to a file, whereas other links may lead to a folder
SPARSE = "sparse file"
WRONG_SIZE = "wrong size in its header"
SWALLOWED = f"inside another file, which has a {WRONG_SIZE}"
BLOCK = 512  # bytes: a member begins with one, and is filled up to a whole number of them
_MAGIC, _AT = np.frombuffer(b"ustar", np.uint8), 257  # of a header

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PADDING = 2**20  # the most zeros after the end of a tar: more than any usual record size


Paths = str | Place | Sequence[str | Place]


class Member(NamedTuple):
    """A file of a tar, or a link to one under the link's name, and where its bytes are.

    Attributes:
        lost: why it cannot be read; "" if it can.
    """

    name: str
    offset: int
    bytes: int
    lost: str = ""


class Contents(NamedTuple):
    """The files of a tar in order, and its size and time.

    If the tar is not `whole`, the last file may be truncated, and others may be missing.
    """

    members: list[Member]
    whole: bool
    stat: Stat


class StreamMember(NamedTuple):
    """The current file of a stream; its blocks must be read before the next one, or never."""

    name: str
    bytes: int
    lost: str
    read: Callable[[], bytes]


@runtime_checkable
class Source(Protocol):
    """The source of a stream: a file, or the output of a command."""

    def read(self, size: int) -> bytes: ...


class Compressed(tarfile.ReadError):
    """The tar is compressed; the message says how, and how to unpack it."""


class Header(tarfile.TarInfo):
    """The header of a member, which counts as damaged if its size is impossible.

    (With a negative size, tarfile would seek backwards and loop for ever.)
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile's own hook
        if self.size < 0 or (self.size > MAX_HEADER and not self.isreg()):
            raise tarfile.InvalidHeaderError("bad size")
        return super()._proc_member(archive)


def tars_of(folder: Place) -> list[Place]:
    """Return the tars of a folder, sorted, without hidden ones (macOS adds a `._NAME.tar` to each).

    Raises:
        UserError: all of them are compressed, or a web server lists nothing.
    """
    files = places.files_of(folder)
    found = [one for one in files if one.suffix == ".tar" and not one.name.startswith(".")]
    packed = [] if found else [one for one in files if one.name.endswith(PACKED)]
    if packed:
        raise UserError(f"{packed[0]} is compressed ({len(packed)} such tars): unpack them")
    return found


def listed(path: Paths) -> list[Place]:
    """Return the sorted tars of a folder, a glob or a list; an existing path is never a glob.

    Raises:
        UserError: there are none, or two have the same name.
    """
    if not isinstance(path, str | Place):
        found = places.in_order(map(place, path))
    elif places.is_folder(place(path)):
        found = tars_of(place(path))
    else:
        found = places.matched(place(path))
    if not found:
        raise UserError(f"{path}: no .tar is there; give the folder of the shards, or a glob")
    if twice := [stem for stem, n in Counter(tar.stem for tar in found).items() if n > 1]:
        raise UserError(f"two shards are called {twice[0]}: rename one, as names identify shards")
    return found


def contents(tar: Place) -> Contents:
    """Return the files of a tar, by reading its headers only.

    A hard link points to the last file of its target's name before it, a symbolic link to the last
    one in the tar, as if the tar were unpacked.

    Raises:
        UserError: the tar cannot be opened, or is compressed.
    """
    found: list[tarfile.TarInfo] = []
    try:
        with explained(f"cannot read {tar}"):
            ranges = opened(tar)
            file = as_file(ranges)
            _check_plain(file.read(8))
            file.seek(0)
            whole = _headers(file, ranges.stat.bytes, found)
    except Compressed as error:
        raise UserError(f"{tar}: {error}") from error
    return Contents(_followed(found), whole, ranges.stat)


def _check_plain(start: bytes) -> None:
    for magic, (writer, unpacker) in COMPRESSED.items():
        if start.startswith(magic):
            raise Compressed(f"it is compressed with {writer}: unpack it ({unpacker})")


def _headers(file: BufferedReader, size: int, found: list[tarfile.TarInfo]) -> bool:
    """Append the headers of a tar of this size to `found`; return whether it is complete."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Header, encoding="utf-8") as archive:
            while member := archive.next():
                archive.members.clear()  # tarfile would keep them all
                found.append(member)
                end = archive.offset
                cut = member.size > size - member.offset_data
                if cut and member.isreg() and not member.issparse():
                    return False
    except (tarfile.TarError, ValueError, RecursionError):
        return False
    file.seek(end)
    rest = file.read(_PADDING + 1)  # a preallocated, partly written file has more zeros
    return 512 <= len(rest) <= _PADDING and not any(rest)


def _followed(found: list[tarfile.TarInfo]) -> list[Member]:
    """Return the files and the links to files; links to folders of the tar are dropped."""
    if not any(m.islnk() or m.issym() for m in found):
        return [_file(m) for m in found if m.isreg()]
    last: dict[str, int] = {}
    before: dict[int, int | None] = {}  # the target of each hard link
    for i, member in enumerate(found):
        if member.islnk():
            before[i] = last.get(normpath(member.linkname))
        last[normpath(member.name)] = i

    def target(i: int | None) -> tarfile.TarInfo | None:
        place = found[i].name
        for _ in range(40):  # links may form chains, or cycles
            if i is None or not (found[i].islnk() or found[i].issym()):
                break
            if found[i].islnk():  # the same file at another place, from where it may lead elsewhere
                i = before[i]
            else:
                place = _target(place, found[i])
                i = last.get(place)
        return None if i is None or found[i].islnk() or found[i].issym() else found[i]

    folders = {normpath(m.name) for m in found if m.isdir()}
    folders |= {folder for m in found for folder in _parents(normpath(m.name))}
    members = []
    for i, member in enumerate(found):
        if member.isreg():
            members.append(_file(member))
        elif member.islnk() or member.issym():
            file = target(i)
            if file is not None and file.isreg():
                members.append(_file(file)._replace(name=member.name))
            elif not (member.issym() and _target(member.name, member) in folders):
                members.append(Member(member.name, 0, 0, LINK))
    return members


def _file(member: tarfile.TarInfo) -> Member:
    if member.issparse():
        return Member(member.name, 0, 0, SPARSE)
    return Member(member.name, member.offset_data, member.size)


def _target(place: str, link: tarfile.TarInfo) -> str:
    """Return where a symbolic link at this place leads."""
    return normpath(join(dirname(place), link.linkname))


def filled(size: int) -> int:
    """Return the size of a member's blocks."""
    return -(-size // BLOCK) * BLOCK


def is_whole(blocks: bytes, size: int) -> bool:
    """Return whether a member's blocks agree with the size in its header.

    If that is too small, bytes follow where zeros fill the last block; if it is too large, the
    member may contain others.
    """
    return not contains_members(blocks) and not any(blocks[size:])


def contains_members(blocks: bytes) -> bool:
    """Return whether there is a header in a member's blocks."""
    rows = np.frombuffer(blocks, np.uint8, len(blocks) // BLOCK * BLOCK).reshape(-1, BLOCK)
    return bool((rows[:, _AT : _AT + len(_MAGIC)] == _MAGIC).all(1).any())


def _parents(name: str) -> Iterator[str]:
    while name := dirname(name):
        yield name
        if name == "/":
            return


class _StreamHeader(Header):
    @classmethod
    def fromtarfile(cls, tar: "_StreamedTar") -> "_StreamHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.ended = True
            raise


class _StreamedTar(tarfile.TarFile):
    tarinfo = _StreamHeader
    ended = False


class _Begun:
    """A file whose first bytes were already read."""

    def __init__(self, start: bytes, file: Source):
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        data, self.start = self.start[:size], self.start[size:]
        return data or self.file.read(size)


def streamed(file: Source) -> Iterator[StreamMember]:
    """Yield the files of a tar that is read sequentially; links are marked as lost.

    Raises:
        Compressed: the tar is compressed.
        one of `BROKEN`: the tar is damaged or truncated.
    """
    start = file.read(8)
    _check_plain(start)
    with _StreamedTar.open(fileobj=_Begun(start, file), mode="r|", encoding="utf-8") as tar:
        while member := tar.next():
            lost = HARD_LINK if member.islnk() else "" if member.isreg() else STREAMED_LINK
            lost = SPARSE if member.issparse() else lost
            if member.isreg() or member.islnk() or member.issym():
                yield StreamMember(member.name, member.size, lost, lambda m=member: _data(tar, m))
            tar.members.clear()
        # Read the padding too: a command writing into a closed pipe would fail.
        rest = tar.fileobj.read(_PADDING + 1)
        if not tar.ended or len(rest) > _PADDING or any(rest):
            raise tarfile.ReadError("no end")


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read() + tar.fileobj.read(-member.size % BLOCK)
