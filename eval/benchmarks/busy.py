"""How much of its rate a training keeps beside a busy process, by how its threads wait.

    python -m cascade.eval.benchmarks.busy [--rounds 7]

Processes train the same small decoder: with two threads that Linux moves as it likes, with two that
each stay on a processor (as `cascade train` has them, `cascade.training.threads`), with two that
sleep at once where they wait, and with one. They take turns, alone, beside a process that spins,
and beside one that is niced. All share two processors; rates are medians. Processes of others
distort the result: the caption says how busy they were.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cascade.files import processors
from cascade.formats.texts import lines

TRAINING = ["stage=decoder_text", "text=clip_tiny", "net=unet_tiny", "size=16"]
WARM = 3  # steps before the first trial
NICED = 15
WAYS = {  # to have threads, by the variables that say so
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "false"},
    "two apart": {"OMP_NUM_THREADS": "2"},
    "two that sleep": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BESIDE = {  # niceness of the busy process, and the share of the rate alone that is to be kept
    "alone": (None, None),
    "beside a busy process": (0, 0.4),
    f"beside one niced by {NICED}": (NICED, 0.7),
}


class Trial(NamedTuple):
    """Images per second, and how many processors were busy with other work meanwhile."""

    rate: float
    others: float


class Training:
    """A process that trains when it is asked to."""

    def __init__(self, environment: Mapping[str, str], batch: int):
        command = [sys.executable, "-m", "cascade.eval.benchmarks.busy", "--serve", str(batch)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.process.stdout.readline()

    def trial(self, seconds: float) -> tuple[float, float]:
        """Train for some seconds: images per second, and seconds of CPU time per second."""
        print(seconds, file=self.process.stdin, flush=True)
        rate, used = self.process.stdout.readline().split()
        return float(rate), float(used)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(batch: int) -> None:
    """Train for as many seconds as each line of the input says."""
    from cascade.config.compose import built
    from cascade.eval.benchmarks import gpu
    from cascade.training.rehearsal import batches, rehearsed
    from cascade.training.threads import apart

    config, _ = rehearsed(TRAINING)
    module = built(config.stage)
    step = gpu.training(module, batches(config, module)(batch))
    for _ in range(WARM):
        step()
    with apart():
        print("ready", flush=True)
        for line in sys.stdin:
            begin, used, steps = time.perf_counter(), time.process_time(), 0
            while (took := time.perf_counter() - begin) < float(line):
                step()
                steps += 1
            print(steps * batch / took, (time.process_time() - used) / took, flush=True)


@contextmanager
def busy(niceness: int | None) -> Iterator[None]:
    """Keep one processor busy meanwhile; None: do not."""
    if niceness is None:
        yield
        return
    spin = f"import os; os.nice({niceness}); print(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-S", "-c", spin], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def measured(
    trainings: Mapping[str, Training], rounds: int, seconds: float
) -> dict[tuple[str, str], list[Trial]]:
    """Run the trials of each training in each situation, by (situation, training), in turns."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for _ in range(rounds):
        for situation, (niceness, _) in BESIDE.items():
            for name, training in trainings.items():
                with busy(niceness):
                    before, begin = _busy_seconds(), time.perf_counter()
                    rate, used = training.trial(seconds)
                    every = (_busy_seconds() - before) / (time.perf_counter() - begin)
                found.setdefault((situation, name), []).append(Trial(rate, max(every - used, 0.0)))
    return found


def _busy_seconds() -> float:
    """CPU time that all processes have used together since the start of the machine."""
    user, nice, system = map(int, processors.lines_of("/proc/stat")[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def table(found: Mapping[tuple[str, str], Sequence[Trial]]) -> Table:
    """Images per second, with the share of the rate alone."""
    names = list(dict.fromkeys(name for _, name in found))
    alone = {name: median(t.rate for t in found["alone", name]) for name in names}
    out = Table("images per second", *names, "target", title="Training on two processors")
    for situation, (_, target) in BESIDE.items():
        rates = {name: median(t.rate for t in found[situation, name]) for name in names}
        shown = [f"{rate:,.1f} ({rate / alone[name]:.2f})" for name, rate in rates.items()]
        out.add_row(situation, *shown, "" if target is None else f"{target:.1f}")
    others = median(t.others for name in names for t in found["alone", name])
    out.caption = f"other processes kept {others:.1f} of the machine's processors busy"
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=lines(__doc__)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.7, help="of a trial (0.7)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--serve", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    given = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    trainings = {name: Training(given | way, args.batch) for name, way in WAYS.items()}
    try:
        found = measured(trainings, args.rounds, args.seconds)
    finally:
        for training in trainings.values():
            training.close()
    Console().print(table(found))


if __name__ == "__main__":
    main()
