"""What the soak has seen: its state, from which another sitting goes on, and its report."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from rich.table import Table

from cascade.files.atomic import write_text

SAVE_SECONDS = 120.0  # the default: half of it is lost on average, as here every step is saved


@dataclass
class Soak:
    """What happened so far, which is written to `state.json` after each fault.

    Attributes:
        step_seconds, start_seconds: of an undisturbed step, and until the first one is done.
        struck: of each fault: run, kind, exit codes, seconds lost, starts.
        finished: runs that were compared with the undisturbed one.
        slow: how often the watchdog ended a start because the machine was too busy.
        wrong: what must not happen, in words.
    """

    out: Path
    seed: int
    step_seconds: dict[str, float] = field(default_factory=dict)
    start_seconds: dict[str, float] = field(default_factory=dict)
    struck: list[dict] = field(default_factory=list)
    finished: int = 0
    slow: int = 0
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, out: Path, seed: int) -> "Soak":
        soak, file = cls(out, seed), out / "state.json"
        if file.exists():
            found = json.loads(file.read_text())
            if found["seed"] != seed:
                raise SystemExit(f"{file} is of seed {found['seed']}: choose another --out")
            soak.__dict__.update({**found, "out": out})
        return soak

    def save(self) -> None:
        write_text(self.out / "state.json", json.dumps({**self.__dict__, "out": str(self.out)}))


def report(soak: Soak, skipped: Sequence[str]) -> tuple[dict, Table]:
    """What happened, as JSON and as a table."""
    kinds = Counter(one["kind"] for one in soak.struck)
    table = Table("fault", "struck", "starts again", "lost, median s", "worst", box=None)
    found = {}
    for kind, count in sorted(kinds.items()):
        some = [one for one in soak.struck if one["kind"] == kind]
        lost, starts = [one["lost"] for one in some], sum(len(one["codes"]) for one in some)
        found[kind] = {
            "struck": count,
            "starts": starts,
            "median": median(lost),
            "worst": max(lost),
        }
        table.add_row(kind, str(count), str(starts), f"{median(lost):.1f}", f"{max(lost):.1f}")
    lost = [one["lost"] for one in soak.struck] or [0.0]
    whole = mean(lost) + SAVE_SECONDS / 2
    about = {
        "faults": len(soak.struck),
        "recovered": len(soak.struck) - sum("no progress" in line for line in soak.wrong),
        "runs finished, and compared": soak.finished,
        "ended by the watchdog on a busy machine": soak.slow,
        "lost, median s": median(lost),
        "lost, worst s": max(lost),
        "effective training time at one fault an hour": round(1 - whole / 3600, 4),
        "of that, seconds between saves": SAVE_SECONDS / 2,
        "undisturbed step, s": soak.step_seconds,
        "by run": Counter(one["run"] for one in soak.struck),
        "left out": list(skipped),
        "wrong": soak.wrong,
    }
    table.add_section()
    table.add_row("all", str(len(soak.struck)), "", f"{median(lost):.1f}", f"{max(lost):.1f}")
    return {**about, "by kind": found}, table
