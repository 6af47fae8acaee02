"""The right to write into a run's directory, which one process has at a time.

It is a claim file whose number only grows, so that whoever lost it can tell. A newer attempt of a
launcher makes the next file at once, which the older attempt sees; then it waits until that has
let go of its own, is dead, or has had `BOUND` seconds to end. Any other process is told who is at
work. Nothing is renamed into the directory without a last look (`cascade.files.fenced`).
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cascade.data import claims
from cascade.data.claims import RELEASED, ClaimFiles, Holder, Seen
from cascade.errors import Superseded, UserError
from cascade.files import REST, fenced

NAME = "lease"
LOOK = 1.0  # seconds between two looks, while it waits
# An older attempt sees the newer one within a beat (and a minute, on NFS); if it has not ended
# `GRACE` seconds later it is ended. Together that is less than `BOUND`.
GRACE = 120.0
BOUND = 240.0
_TRY_AGAIN = 75


@contextmanager
def lease(folder: Path) -> Iterator["Lease"]:
    """Holds the lease of a folder, which is made for it if need be, and removed if it stays empty.

    Raises:
        UserError: another process is at work there, or the folder cannot be written to.
        Superseded: a newer attempt is.
    """
    one, made = Lease(folder), not folder.exists()
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            one.take()
        except OSError as error:
            if isinstance(error, Superseded):
                raise
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
        with fenced(folder, one.check):
            yield one
    finally:
        one.release()
        if made:
            _remove_empty(folder)


def holders(folder: Path) -> list[Holder]:
    """Who holds the lease of a folder, as far as one look can tell: the dead of other machines too.

    Nothing is written.
    """
    seen = ClaimFiles(folder, NAME).look().values()
    return [one.holder for one in seen if one.holder and not one.over]


def _remove_empty(folder: Path) -> None:
    first = ClaimFiles(folder, NAME).path(0)
    with suppress(OSError):  # another has come
        if [*folder.iterdir()] == [first]:
            first.unlink()
            folder.rmdir()


class Lease:
    """Use `lease`.

    Attributes:
        lost: whether another has taken over, as of the last beat.
    """

    def __init__(self, folder: Path):
        self.folder, self.lost = folder, False
        self._files, self._me = ClaimFiles(folder, NAME), Holder.here()
        self._number: int | None = None
        self._beats = ExitStack()
        self._lost_at = 0.0

    def take(self) -> None:
        """Waits until it is held. Where this raises, `release` has to follow.

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
        """Whether all others are older attempts. Raises if one is sure to be at work."""
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
            f"{max(claims.SILENCE, BOUND):.0f} s at most",
            file=sys.stderr,
        )

    def _look(self) -> None:
        try:
            self.lost = self.lost or max(self._files.numbers(), default=-1) != self._number
        except OSError:  # the next look may see more
            return
        self._lost_at = self._lost_at or (time.monotonic() if self.lost else 0.0)
        if self.lost and time.monotonic() - self._lost_at > GRACE:
            print(f"cascade: {self._superseded()}", file=sys.__stderr__, flush=True)
            os._exit(_TRY_AGAIN)  # whatever it waits for

    def check(self) -> None:
        """Raises Superseded if another has taken over."""
        if self._number is None or max(self._files.numbers(), default=-1) != self._number:
            self.lost = True
            raise self._superseded()

    def _superseded(self) -> Superseded:
        newest = max(self._files.look().items(), default=(-1, None))[1]
        who = (newest and newest.holder) or "another process"
        return Superseded(f"{self.folder} was taken over by {who}: this process ends")

    def release(self) -> None:
        """Lets go of it; whoever comes next need not wait."""
        number, self._number = self._number, None
        if number is None:
            return
        self._beats.close()
        path = self._files.path(number)
        with suppress(OSError):  # the folder is gone, or the disk: then nobody waits either
            if max(self._files.numbers(), default=-1) == number:
                # The file stays: a number is never given twice. Killed here, it names a dead one.
                beside = path.with_name(f"{path.name}.{os.getpid()}{REST}")
                with beside.open("w") as file:
                    file.write(RELEASED)
                os.replace(beside, path)
            else:
                path.unlink()
