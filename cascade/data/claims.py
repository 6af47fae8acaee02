"""Who works on what: exclusive claims among all processes, on all machines, that share a folder.

A claim is a lock on one byte of the file `.claims`, which the system takes back when its holder
dies, however it dies. File systems without locks (Lustre as it is often mounted) get claim files
that their holder touches all the time: who stays silent for long is taken for dead. Claims save
work, they do not guard data: what is claimed must be written so that it is whole or not there.
"""

import errno
import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 20.0  # seconds between two touches of a claim file, and between two looks at it
SILENCE = 180.0  # seconds without a touch; on NFS a look may be a minute late

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claims:
    """Claims by name in a folder; at most one object for each folder in a process."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = open(folder / ".claims", "ab")  # noqa: SIM115 (closing it ends all claims)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @contextmanager
    def held(self, name: str, wait: bool) -> Iterator[bool]:
        """Holds a claim, or yields False if somebody else does.

        Args:
            wait: until the others let go of it, or die.
        """
        byte = zlib.crc32(name.encode())  # two names with one byte only wait for each other
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                with _held_by_file(self.folder, name, wait) as mine:
                    yield mine
            elif error.errno in _TAKEN:
                yield False
            else:
                raise
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)


@contextmanager
def _held_by_file(folder: Path, name: str, wait: bool) -> Iterator[bool]:
    """The same by files `.{name}.claim-{n}`, the newest of which counts.

    Where it is dead, n + 1 follows: of several who would make that file one succeeds, while a file
    that is removed and made anew could be removed by the next one. A silence is measured by the
    clock of who listens, as clocks of machines differ.
    """
    seen, since = None, 0.0
    while True:
        number, _ = newest = _newest(folder, name)
        if newest != seen:
            seen, since = newest, time.monotonic()
        own = folder / f".{name}.claim-{number + 1}"
        if (number < 0 or time.monotonic() - since >= SILENCE) and _made(own):
            break
        if not wait:
            yield False
            return
        time.sleep(BEAT)
    done = threading.Event()
    beats = threading.Thread(target=_touch, args=(own, done), daemon=True)
    beats.start()
    try:
        yield True
    finally:
        done.set()
        beats.join()
        for n in range(number + 2):
            (folder / f".{name}.claim-{n}").unlink(missing_ok=True)


def _newest(folder: Path, name: str) -> tuple[int, int]:
    """Number of the newest claim, and when it was touched; -1 if there is none."""
    number, touched = -1, 0
    with suppress(FileNotFoundError):
        while True:
            touched = (folder / f".{name}.claim-{number + 1}").stat().st_mtime_ns
            number += 1
    return number, touched


def _made(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):  # taken for dead, and removed: the other does the work
            os.utime(path)
