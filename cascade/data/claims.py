"""Who works on what: exclusive claims among all processes, on all machines, that share a folder.

A claim is a lock on one byte of the file `.claims`, which the system takes back when its holder
dies, however it dies. File systems without locks (Lustre as it is often mounted) get claim files
that their holder touches all the time: who stays silent for long is taken for dead, and a process
of this machine as soon as it is. Claims save work, they do not guard data: what is claimed must be
written so that it is whole or not there. (`cascade.data.lease` guards, with the same files.)
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cascade.done import attempt

BEAT = 20.0  # seconds between two touches of a claim file, and between two looks at it
SILENCE = 180.0  # seconds without a touch; on NFS a look may be a minute late
RELEASED = "released\n"  # what a claim file holds whose holder has let go of it

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
    that is removed and made anew could be removed by the next one.
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
    """The process that holds a claim, as it names itself in the file.

    Args:
        place: the running system and its table of processes, where `pid` can be looked up.
        started: when, by that system: another process may have its number later.
        since: when the claim was made, to be read by people.
        attempt: its number among a launcher's attempts in this folder; None: started by hand.
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
        """None: it is of another machine, or of a container whose processes are not seen here."""
        if self.place != _place():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's
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
    """State and start of a process, in Linux's words; empty where they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Seen:
    """A claim file as it was seen last.

    Args:
        holder: None: not written yet, or released.
        touched: when, by the clock of whoever keeps the file.
        since: for how long it has been as it is, by our clock (`time.monotonic()`).
        moved: whether it was touched while we looked.
    """

    holder: Holder | None
    released: bool
    touched: int
    since: float
    moved: bool

    @property
    def over(self) -> bool:
        """Whether its holder has let go of it, or is dead, or must be taken for dead."""
        dead = self.holder is not None and self.holder.here_and_alive is False
        return self.released or dead or time.monotonic() - self.since >= SILENCE


class ClaimFiles:
    """The claim files of a name in a folder, watched by one process.

    A silence is measured by the clock of who listens, as clocks of machines differ.
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
        """What is there now, by number."""
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
        """Makes a claim file of this process; False if somebody else was faster."""
        try:
            with self.path(number).open("x") as file:
                file.write(json.dumps(asdict(Holder.here())) + "\n")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def beating(self, number: int, each: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Touches a file every `BEAT` seconds, from another thread, which calls `each` as well."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                with suppress(OSError):  # taken for dead, and removed: the other does the work
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
