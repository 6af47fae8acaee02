"""The lease of a run's directory: the right to write there, which one process holds at a time.

A lease is a claim file whose number only grows, so that a process can tell that it lost it. A newer
attempt of a launcher creates the next file at once, and waits until the older attempt, which
notices it, has released its own, is dead, or has had `BOUND` seconds to end. Any other process is
refused, and told who holds the lease. Every rename into the directory checks the lease first
(`cascade.files.atomic.fenced`).
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cascade.errors import Superseded, UserError, explained
from cascade.files import locks
from cascade.files.atomic import REST, fenced
from cascade.files.locks import RELEASED, ClaimFiles, Holder, Seen

NAME = "lease"
LOOK = 1.0  # seconds between two looks while waiting
# An older attempt notices the newer one within a beat (on NFS, a minute later), and is killed if it
# has not ended `GRACE` seconds after that. Together this is less than `BOUND`.
GRACE = 120.0
BOUND = 240.0
_TRY_AGAIN = 75


@contextmanager
def lease(folder: Path) -> Iterator["Lease"]:
    """Hold the lease of a folder within the context.

    The folder is created if necessary, and then removed again if it stays empty.

    Raises:
        UserError: another process holds the lease, or the folder is not writable.
        Superseded: a newer attempt holds the lease.
    """
    one, made = Lease(folder), not folder.exists()
    try:
        with explained(f"cannot write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            one.take()
        with fenced(folder, one.check):
            yield one
    finally:
        one.release()
        if made:
            _remove_empty(folder)


def holders(folder: Path) -> list[Holder]:
    """The processes that seem to hold the lease of a folder; writes nothing.

    A single look cannot tell dead processes of other machines from live ones.
    """
    seen = ClaimFiles(folder, NAME).look().values()
    return [one.holder for one in seen if one.holder and not one.over]


def _remove_empty(folder: Path) -> None:
    first = ClaimFiles(folder, NAME).path(0)
    with suppress(OSError):  # another process writes here now
        if [*folder.iterdir()] == [first]:
            first.unlink()
            folder.rmdir()


class Lease:
    """A held lease; use `lease` to get one.

    Attributes:
        lost: whether another process had taken over at the last beat.
    """

    def __init__(self, folder: Path):
        self.folder, self.lost = folder, False
        self._files, self._me = ClaimFiles(folder, NAME), Holder.here()
        self._number: int | None = None
        self._beats = ExitStack()
        self._lost_at = 0.0

    def take(self) -> None:
        """Wait for the lease. Call `release` afterwards, even if this raises.

        Raises:
            UserError, Superseded: as `lease` does.
        """
        told, asked = False, 0.0
        while True:
            seen = self._files.look()
            others = {n: one for n, one in seen.items() if n != self._number and not one.over}
            if self._number is None:
                if self._may_take(others):
                    self._ask(max(seen, default=-1) + 1)
                    asked = time.monotonic()
                    continue
            elif max(seen, default=-1) > self._number:
                raise self._superseded()
            elif not others or time.monotonic() - asked >= BOUND:
                break
            if others and not told:
                self._tell(others)
                told = True
            time.sleep(LOOK)
        for number in seen.keys() - {self._number}:
            self._files.path(number).unlink(missing_ok=True)

    def _may_take(self, others: Mapping[int, Seen]) -> bool:
        """Whether all holders are older attempts. Raises if another holder is certainly alive."""
        older = True
        for one in others.values():
            theirs, ours = one.holder and one.holder.attempt, self._me.attempt
            if not (theirs and ours):
                older = False
                if one.holder and (one.moved or one.holder.here_and_alive):
                    raise UserError(
                        f"{self.folder} is written to by {one.holder}: let it end, or end it "
                        "first, or choose another directory"
                    )
            elif theirs >= ours:
                raise Superseded(f"{self.folder}: {one.holder} is a newer attempt than {ours}")
        return older

    def _ask(self, number: int) -> None:
        if self._files.make(number):
            self._number = number
            self._beats.enter_context(self._files.beating(number, self._look))

    def _tell(self, others: Mapping[int, Seen]) -> None:
        who = ", ".join(str(one.holder or "somebody") for one in others.values())
        print(
            f"cascade: {self.folder} was written to by {who}: waiting until that ends, "
            f"{max(locks.SILENCE, BOUND):.0f} s at most",
            file=sys.stderr,
        )

    def _look(self) -> None:
        try:
            self.lost = self.lost or max(self._files.numbers(), default=-1) != self._number
        except OSError:  # the disk may answer at the next look
            return
        self._lost_at = self._lost_at or (time.monotonic() if self.lost else 0.0)
        if self.lost and time.monotonic() - self._lost_at > GRACE:
            print(f"cascade: {self._superseded()}", file=sys.__stderr__, flush=True)
            os._exit(_TRY_AGAIN)  # the main thread may hang

    def check(self) -> None:
        """Raise Superseded if another process has taken over."""
        if self._number is None or max(self._files.numbers(), default=-1) != self._number:
            self.lost = True
            raise self._superseded()

    def _superseded(self) -> Superseded:
        newest = max(self._files.look().items(), default=(-1, None))[1]
        who = (newest and newest.holder) or "another process"
        return Superseded(f"{self.folder} was taken over by {who}: this process ends")

    def release(self) -> None:
        """Release the lease, so that the next process need not wait."""
        number, self._number = self._number, None
        if number is None:
            return
        self._beats.close()
        path = self._files.path(number)
        with suppress(OSError):  # without the folder or the disk, nobody waits for the lease
            if max(self._files.numbers(), default=-1) == number:
                # Keep the file, so that no number is used twice. If this process is killed here,
                # the file names a dead process, which is as good.
                beside = path.with_name(f"{path.name}.{os.getpid()}{REST}")
                beside.write_text(RELEASED)
                os.replace(beside, path)
            else:
                path.unlink()
