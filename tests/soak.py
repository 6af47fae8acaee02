"""A night of faults: tiny trainings on several ranks, disturbed by a driver until they are done.

    make soak

A prior and a decoder train on 2 and on 4 ranks. The driver draws faults by a seed, strikes at
random moments, and starts the same command again, until a run is finished; then its checkpoint is
compared with that of an undisturbed run, and a new run begins. It plays the launcher's part as
well: if a rank is stopped for good, it is killed once another one has ended. It signals only
processes that it started. The state is in a file, so that the same command goes on after it was
ended.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from cascade.files.atomic import write_text
from cascade.files.locks import Claims
from tests import soak_faults as faults
from tests import soak_work as work
from tests.processes import Job
from tests.small import DECODER, EMBEDDED, PRIOR
from tests.soak_report import Soak, report

STEPS, BATCH = 16, work.BATCH
COMMON = [f"batch={BATCH}", f"images={STEPS * BATCH}", "warmup=8", "grids=0", "ema=0.9"]
COMMON += ["save_seconds=0.0", "optim.lr=1e-3"]
RUNS = {
    f"{name}, {ranks} ranks": (overrides, ranks)
    for ranks in (2, 4)
    for name, overrides in {
        "prior": PRIOR,
        "decoder": ["stage=decoder", *DECODER[1:], *EMBEDDED],
    }.items()
}
POLL = 0.02  # seconds
SETTLE = 3  # steps after which a fault has no more effect: a signal takes two
TRIES = 6  # starts without progress after one fault, until it counts as not recovered
ORPHANS = 15.0  # seconds until a data worker has noticed that its rank is dead
# Also those of a process that gets a signal before it has said what to do with it.
GOOD = {0, 1, 75, 130, -signal.SIGKILL, *(-number for number in faults.SIGNALS)}


class Disturbed:
    """A run that is disturbed: the job that trains, and what faults do to it."""

    def __init__(self, soak: Soak, name: str, disk: faults.Disk):
        self.soak, self.name, self.disk = soak, name, disk
        self.overrides, self.ranks = RUNS[name]
        self.run, self.data = disk.folder / "run", soak.out / "data"
        self.step_seconds = soak.step_seconds.get(name, 0.0)
        start = soak.start_seconds.get(name, 0.0)
        self.watchdog = max(5.0, 15 * self.step_seconds, 2 * start)
        # Before the first step and between two steps the watchdog waits thrice as long.
        self.bound = 3.25 * self.watchdog + 4 * soak.start_seconds.get(name, 30.0)
        self.job: Job | None = None
        self.groups: dict[int, float] = {}  # process groups of ended ranks, and when they ended

    def start(self) -> None:
        argv = ["train", *self.overrides, *COMMON, f"data.path={self.data}"]
        argv += [f"clip.path={self.data / 'clip'}", f"run={self.run}", f"watchdog={self.watchdog}"]
        argv += [f"trainer.devices={self.ranks}", f"workers={faults.workers()}"]
        out = self.soak.out / "output" / self.name.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        self.job = Job(work.trained, (argv,), out=out, ranks=self.ranks)
        self.killed = False

    @property
    def step(self) -> int:
        """Of the newest checkpoint; every step saves one."""
        folder = self.run / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)

    @property
    def alive(self) -> list[int]:
        return [p.pid for p in self.job.processes if p.is_alive()] if self.job else []

    def ended(self, stopped: Sequence[int], since: float) -> list[int] | None:
        """The exit codes once all ranks have ended; a rank that waits too long is killed."""
        codes = [p.exitcode for p in self.job.processes]
        if None not in codes:
            self.groups |= {p.pid: time.monotonic() for p in self.job.processes}
            return codes
        if any(code is not None for code in codes):
            for pid in set(stopped) & set(self.alive):
                os.kill(pid, signal.SIGKILL)  # as srun does
        if time.monotonic() - since > self.bound and not self.killed:
            self.wrong(f"ranks waited for more than {self.bound:.0f} s: {codes}")
            self.job.kill()
            self.killed = True
        return None

    def wrong(self, what: str) -> None:
        self.soak.wrong.append(f"{self.name}: {what}")
        shutil.copytree(
            self.job.files[0].parent,
            self.soak.out / f"wrong-{len(self.soak.wrong)}",
            dirs_exist_ok=True,
        )

    def until(self, seconds: float, reached: Callable[[], bool]) -> bool:
        """Wait; return whether all ranks have ended meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not reached():
            if all(p.exitcode is not None for p in self.job.processes):
                return True
            time.sleep(POLL)
        return False

    def moment(self, rng: np.random.Generator) -> None:
        """Wait for a random moment of a run that goes on, or of its start."""
        while True:
            if not self.job:
                self.start()
            if rng.random() < 0.25:
                over = self.until(rng.uniform(0, 2.0), lambda: False)
            else:
                goal = self.step + int(rng.integers(1, 4))
                over = self.until(self.bound, lambda goal=goal: self.step >= goal)
                over = over or self.until(rng.uniform(0, self.step_seconds), lambda: False)
            if not over:
                return
            self.finish()

    def strike(self, number: int) -> dict:
        """Strike once; return what happened, once there is progress again, or the run is done."""
        rng = np.random.default_rng([self.soak.seed, number])
        self.moment(rng)
        fault, before, codes, over = faults.drawn(rng, self), self.step, [], False
        at = since = time.monotonic()
        fault.strike()
        while not over and not before + (0 if codes else SETTLE) < self.step < STEPS:
            fault.mend(time.monotonic() - at, over=False)
            if (found := self.ended(fault.stopped, since)) is None:
                time.sleep(POLL)
                continue
            codes.append(found)
            if not {*found} <= GOOD | fault.codes:
                self.wrong(f"{fault.name}: exit codes {found}")
            fault.mend(time.monotonic() - at, over=True)
            over = not any(found) or len(codes) > TRIES
            if not over:
                self.start()
                since = time.monotonic()
        took, step = time.monotonic() - at, self.step
        fault.mend(1e9, over=True)
        if len(codes) > TRIES:
            self.wrong(f"{fault.name}: no progress in {TRIES} starts, {codes}")
        self.orphans()
        if over:
            self.finish()
        lost = round(max(0.0, took - (step - before) * self.step_seconds), 3)
        return {"run": self.name, "kind": fault.name, "step": before, "lost": lost, "codes": codes}

    def finish(self) -> None:
        """Compare a run whose ranks have ended with the undisturbed one, and remove it."""
        codes = self.job.wait(self.bound)
        self.groups |= {p.pid: time.monotonic() for p in self.job.processes}
        hung = "ending this process" in self.job.output()
        if hung and set(codes) <= {75, 1}:  # nothing struck: the machine was too busy for it
            self.soak.slow += 1
        elif any(codes):
            self.wrong(f"ended with {codes} at step {self.step} by itself")
        self.job = None
        if any(codes):
            return
        check = Job(work.compare, (str(self.run), str(self.clean)), out=self.soak.out / "compare")
        if check.wait(120) != [0]:
            self.soak.wrong.append(f"{self.name}: differs after {codes}: {check.output()}")
            shutil.copytree(self.run, self.soak.out / f"differs-{len(self.soak.wrong)}")
        self.soak.finished += 1
        shutil.rmtree(self.run)

    @property
    def clean(self) -> Path:
        return self.soak.out / "clean" / self.name.replace(", ", "-").replace(" ", "-")

    def undisturbed(self) -> None:
        """Train once without faults; measure a step."""
        if self.name in self.soak.step_seconds:
            return
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.clean, ignore_errors=True)
        self.watchdog, began = 600.0, time.time()
        self.start()
        if any(self.job.wait(600)):
            raise SystemExit(self.job.output())
        lines = [
            json.loads(line) for line in (self.run / "events.jsonl").read_text().split("\n")[:-1]
        ]
        times = [line["time"] for line in lines if line["event"] == "checkpoint"]
        self.soak.start_seconds[self.name] = times[0] - began
        self.soak.step_seconds[self.name] = (times[-1] - times[0]) / (len(times) - 1)
        shutil.copytree(self.run, self.clean)
        shutil.rmtree(self.run)
        self.__init__(self.soak, self.name, self.disk)

    def orphans(self) -> None:
        """Find processes that outlive their rank."""
        for group, ended in list(self.groups.items()):
            left = faults.group_members(group)
            if not left:
                del self.groups[group]
            elif time.monotonic() - ended > ORPHANS:
                self.wrong(f"processes {left} outlived their rank {group}")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for _ in range(2):  # a stopped process dies of SIGKILL too
            if self.job:
                self.job.kill()
        for process in self.job.processes if self.job else ():
            process.join(10)
            self.groups[process.pid] = time.monotonic()
        end = time.monotonic() + ORPHANS + 1
        while self.groups and time.monotonic() < end:
            self.orphans()
            time.sleep(0.1)


def disturb(soak: Soak, name: str, disk: faults.Disk, count: int, end: float) -> None:
    """Strike until so many faults have struck a run, or until the end of the sitting."""
    one, number = Disturbed(soak, name, disk), list(RUNS).index(name)
    shutil.rmtree(one.run, ignore_errors=True)
    try:
        for nth in range(sum(before["run"] == name for before in soak.struck), count):
            if time.monotonic() > end:
                break
            soak.struck.append(one.strike(len(RUNS) * nth + number))
            soak.save()
    finally:
        one.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trainings under hundreds of faults.")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=600.0, help="of this sitting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--runs", nargs="*", default=list(RUNS), help="which of the four")
    args = parser.parse_args(argv)
    out, end = args.out.absolute(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    faults.prepare_clock(out)
    with Claims(out) as claims, claims.held("soak", wait=False) as mine:
        if not mine:
            raise SystemExit(f"{out}: another process is at work there; wait, or choose --out")
        return whole(Soak.at(out, args.seed), args, end)


def whole(soak: Soak, args: argparse.Namespace, end: float) -> int:
    """Disturb all runs as far as this sitting goes, and report; return the exit code."""
    out = soak.out
    with faults.disk(out / "disk") as disk:
        if not (out / "data" / "ready").exists():
            shutil.rmtree(out / "data", ignore_errors=True)
            job = Job(work.prepare, (str(out / "data"), EMBEDDED), out=out / "prepare")
            if job.wait(300) != [0]:
                raise SystemExit(job.output())
        for name in args.runs:
            Disturbed(soak, name, disk).undisturbed()
            soak.save()
        for left, name in zip(range(len(args.runs), 0, -1), args.runs):
            share = time.monotonic() + max(0.0, end - time.monotonic()) / left
            disturb(soak, name, disk, args.faults // len(args.runs), share)
        about, table = report(soak, faults.left_out(disk))
    write_text(out / "report.json", json.dumps(about, indent=2) + "\n")
    console = Console(width=100, record=True)
    console.print(table)
    for key, value in about.items():
        if key not in ("by kind", "wrong"):
            console.print(f"{key}: {value}", highlight=False)
    for line in soak.wrong:
        console.print(f"WRONG {line}", highlight=False)
    write_text(out / "report.txt", console.export_text())
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    from tests import soak as module  # by which the ranks' processes find it

    sys.exit(module.main())
