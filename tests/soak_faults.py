"""The faults of `tests.soak`, and what they strike: a file system, a clock, processes."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests import soak_work as work
from tests.processes import Job

ROOM = 64 * 2**20  # bytes of the file system that is filled
LIMIT = 4096  # bytes of a file, where no file system can be mounted
HOUR = 3600
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_clock: dict[str, Path] = {}


@dataclass
class Disk:
    """A folder; `room` is whether it is a file system of its own."""

    folder: Path
    room: bool

    @property
    def filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(2**16)):
                    pass
            except OSError:
                return


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Mount a small file system, if that is allowed; else it is an ordinary folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "soak", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    try:
        yield Disk(folder, bool(mounted))
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def prepare_clock(out: Path) -> None:
    """Load libfaketime into the processes to come, if SOAK_FAKETIME is its path; see that it works.

    Their clock is what the file says, and is right at first.
    """
    if library := os.environ.get("SOAK_FAKETIME"):
        file = out / "clock"
        os.environ |= {"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(file)}
        os.environ |= {"FAKETIME_CACHE_DURATION": "1"}
        os.environ |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
        file.write_text(f"+{HOUR}\n")
    if Job(work.is_late, (time.time(),), out=out / "clock-checked").wait(600) == [0]:
        _clock["file"] = file
        file.write_text("+0\n")
    else:
        forget_clock()


def workers() -> int:
    """The number of data workers: none under libfaketime.

    It has a lock that is not released in a child, if another thread holds it when a rank forks.
    """
    return 0 if _clock else 1


def forget_clock() -> None:
    """Keep libfaketime out of later processes."""
    _clock.clear()
    for name in ("LD_PRELOAD", *(name for name in os.environ if "FAKE_MONO" in name)):
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("FAKETIME_")]:
        os.environ.pop(name, None)


def left_out(disk: Disk) -> list[str]:
    """Faults that this sitting has no room for, with the reason."""
    if _clock:
        found = ["a data worker killed: there are none under libfaketime"]
    else:
        found = ["clock moved: SOAK_FAKETIME is not the path of a libfaketime.so.1 that works"]
    return found if disk.room else [*found, "disk full: may not mount, so files are limited"]


@dataclass
class Fault:
    """What strikes, and what mends it: `seconds` later, or once all ranks have ended `ends` times.

    Attributes:
        codes: further exit codes that are right.
        stopped: processes that are stopped for good, which a launcher kills.
    """

    name: str
    strike: Any
    undo: Any = None
    seconds: float = 0.0
    codes: frozenset[int] = frozenset()
    stopped: Sequence[int] = ()
    ends: int = 1

    def mend(self, since: float, over: bool) -> None:
        self.ends -= over
        if self.undo and (self.ends <= 0 or since >= self.seconds):
            undo, self.undo = self.undo, None
            undo()


def send(number: int, pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def drawn(rng, scene) -> Fault:
    """Draw a fault for a run that is being disturbed (`tests.soak.Disturbed`)."""
    alive, run = scene.alive, scene.run
    one = [int(rng.choice(alive))] if alive else []
    soon, away = float(rng.uniform(0.05, 1.0)), scene.data.with_name("away")
    tars = sorted(scene.data.glob("*.tar"))
    tar = tars[int(rng.integers(len(tars)))]
    place = float(rng.uniform(0.05, 0.95))

    def all_gone() -> None:
        send(signal.SIGKILL, alive)
        for process in scene.job.processes if scene.job else ():
            process.join(10)

    def burst() -> None:
        for _ in range(int(rng.integers(3, 12))):
            send(int(rng.choice(SIGNALS)), [int(rng.choice(alive))] if alive else [])

    def flip_newest() -> None:
        all_gone()
        newest = max((run / "checkpoints").glob("step-*"), default=None)
        if newest:
            files = sorted(newest.iterdir())
            flip(files[int(rng.integers(len(files)))], place)

    def flip_tar() -> None:
        all_gone()
        flip(tar, place)

    def back() -> None:
        if away.exists():
            away.rename(scene.data)

    def limit(bytes_: int) -> None:
        for pid in alive:
            with_hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1] if exists(pid) else None
            if with_hard is not None:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (bytes_, with_hard))

    refused = frozenset({2})
    if scene.disk.room:
        full = partial(Fault, "disk full", scene.disk.fill, partial(remove, scene.disk.filler))
    else:
        unlimited = partial(limit, resource.RLIM_INFINITY)
        full = partial(Fault, "files limited", partial(limit, LIMIT), unlimited)
    choices = [
        Fault("a rank killed", partial(send, signal.SIGKILL, one)),
        Fault("all ranks killed", partial(send, signal.SIGKILL, alive)),
        Fault(
            "a rank stopped for a moment",
            partial(send, signal.SIGSTOP, one),
            partial(send, signal.SIGCONT, one),
            soon,
        ),
        Fault("a rank stopped for good", partial(send, signal.SIGSTOP, one), stopped=one),
        Fault("SIGTERM to a rank", partial(send, signal.SIGTERM, one)),
        Fault("SIGTERM to all ranks", partial(send, signal.SIGTERM, alive)),
        Fault("SIGUSR1 to all ranks", partial(send, signal.SIGUSR1, alive)),
        Fault("Ctrl-C", partial(send, signal.SIGINT, alive)),
        Fault("signals in a burst", burst),
        full(seconds=soon, codes=refused),
        Fault("a byte of the newest checkpoint flipped", flip_newest),
        Fault(
            "a byte of a shard flipped", flip_tar, partial(flip, tar, place), 1e9, refused, ends=2
        ),
        Fault("data taken away", partial(scene.data.rename, away), back, soon, refused),
    ]
    if not _clock:
        worker = Fault("a data worker killed", lambda: send(signal.SIGKILL, children(one)[:1]))
        choices.append(worker)
    else:
        hour = int(rng.choice([-HOUR, HOUR]))
        move = partial(_clock["file"].write_text, f"{hour:+d}\n")
        choices.append(
            Fault("clock moved by an hour", move, partial(_clock["file"].write_text, "+0\n"), soon)
        )
    return choices[int(rng.integers(len(choices)))]


def flip(path: Path, place: float) -> None:
    """Flip a byte at a share of a file; a second time, its content is as it was."""
    with path.open("r+b") as file:
        file.seek(at := int(place * path.stat().st_size))
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 255]))


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def children(pids: Sequence[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
    return found


def group_members(group: int) -> list[int]:
    """The processes of a process group, without those that wait for their parent to notice."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found
