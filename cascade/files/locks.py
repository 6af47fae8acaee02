"""Exclusive claims on pieces of work, among all processes on all machines that share a folder.

A claim is a lock on one byte of the file `.claims`, which the system releases when its holder dies.
File systems without locks (often Lustre) get claim files instead, which the holder touches
periodically: stale claims are presumed abandoned, and those of dead processes of this machine are
recognized at once. Claims avoid duplicate work but do not protect data, so claimed work must be
written atomically. (`cascade.files.lease` does protect data, with the same files.)
"""

import errno
import fcntl
import json
import os
import platform
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cascade.files.process import attempt

BEAT = 20.0  # seconds between two touches of a claim file, and between two looks at it
SILENCE = 180.0  # seconds until an untouched claim is stale; NFS may show a touch a minute late
RELEASED = "released\n"  # content of a claim file after its holder released it

# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Claims(AbstractContextManager):
    """Claims by name in a folder. A process must have at most one object per folder."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = open(folder / ".claims", "ab")  # noqa: SIM115 (closing it releases all claims)

    def __exit__(self, *_) -> None:
        self._file.close()

    @contextmanager
    def held(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold a claim within the context; yields False if another process holds it.

        Args:
            wait: for the other processes to release it, or to die.
        """
        byte = zlib.crc32(name.encode())  # names that collide merely wait for each other
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            if error.errno in NO_LOCKS:
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
    """The same with files `.{name}.claim-{n}`, of which the newest counts.

    A stale claim is succeeded by file n + 1 rather than replaced: exactly one process can create
    that file, whereas two that remove and recreate the same file could remove each other's.
    """
    files = ClaimFiles(folder, name)
    while True:
        seen = files.look()
        number = max(seen, default=-1) + 1
        if (not seen or seen[number - 1].over) and files.make(number):
            break
        if not wait:
            yield False
            return
        time.sleep(BEAT)
    try:
        with files.beating(number):
            yield True
    finally:
        for n in range(number + 1):
            files.path(n).unlink(missing_ok=True)


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim, as written in the file.

    Args:
        place: identifies the boot and PID namespace in which `pid` is valid.
        started: start time of the process, since process numbers are reused.
        since: when the claim was made, for people.
        attempt: number of its launcher's attempt; None: started by hand.
    """

    host: str
    place: str
    pid: int
    started: str
    since: str
    attempt: int | None

    @classmethod
    def here(cls) -> "Holder":
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(platform.node(), _place(), pid, _process(pid)[1], since, attempt())

    def __str__(self) -> str:
        which = f" (attempt {self.attempt})" if self.attempt else ""
        return f"process {self.pid} on {self.host}{which}, since {self.since}"

    @property
    def here_and_alive(self) -> bool | None:
        """Whether it runs; None in another machine or container, where this is not visible."""
        if self.place != _place():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process
            pass
        state, started = _process(self.pid)
        return not started or (started == self.started and state not in "ZX")


def _place() -> str:
    parts = [platform.node()]
    with suppress(OSError):  # elsewhere than on Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(pid: int) -> tuple[str, str]:
    """State and start time of a process as in /proc; empty where they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Seen:
    """A claim file as last seen.

    Args:
        holder: None: not written yet, or released.
        touched: its modification time, by the clock of the file server.
        since: when that time was first seen, by our clock (`time.monotonic()`).
        moved: whether it was touched between two looks.
    """

    holder: Holder | None
    released: bool
    touched: int
    since: float
    moved: bool

    @property
    def over(self) -> bool:
        """Whether its holder released it, is dead, or has been silent for too long."""
        dead = self.holder is not None and self.holder.here_and_alive is False
        return self.released or dead or time.monotonic() - self.since >= SILENCE


class ClaimFiles:
    """The claim files of one name in a folder, as watched by one process.

    Silence is measured by the watcher's clock, since the clocks of machines differ.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.prefix = folder, f".{name}.claim-"
        self.seen: Mapping[int, Seen] = {}

    def path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}{number}"

    def numbers(self) -> list[int]:
        names = (entry.name for entry in os.scandir(self.folder))
        found = (name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix))
        return [int(number) for number in found if number.isdigit()]

    def look(self) -> Mapping[int, Seen]:
        """Read all claim files; returns them by number."""
        now, found = time.monotonic(), {}
        for number in self.numbers():
            try:
                touched = self.path(number).stat().st_mtime_ns
                text = self.path(number).read_text()
            except FileNotFoundError:
                continue
            old = self.seen.get(number)
            same = old is not None and old.touched == touched
            since, moved = (old.since, old.moved) if same else (now, old is not None)
            found[number] = Seen(_holder(text), text == RELEASED, touched, since, moved)
        self.seen = found
        return found

    def make(self, number: int) -> bool:
        """Create a claim file for this process; False if another process was faster.

        Raises OSError: the disk is full, say. Nothing is left of the claim, whose holder nobody
        could tell: all would have to wait until it counts as silent.
        """
        try:
            file = self.path(number).open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(asdict(Holder.here())) + "\n")
        except OSError:
            self.path(number).unlink(missing_ok=True)
            raise
        return True

    @contextmanager
    def beating(self, number: int, each: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Within the context, a thread touches a file and calls `each` every `BEAT` seconds."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                with suppress(OSError):  # removed as stale: another process does the work
                    os.utime(self.path(number))
                each()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _holder(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
