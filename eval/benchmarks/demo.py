"""A demo's time, memory and quality, compared with an earlier build's.

    python -m cascade.eval.benchmarks.demo --before OTHER/.venv/bin/cascade [--budget smoke]

Runs `cascade demo` of both builds, one after the other, or resumes them; a finished one is read.
Each needs the machine to itself. The wall time of a stage is that of its training's last row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cascade.errors import UserError
from cascade.files.atomic import write_text
from cascade.runs.run import Run

OWN = Path(sys.executable).with_name("cascade")
TOOK = "took.json"
QUALITY = {
    "one object": "val.image_256.one.binding",
    "two objects": "val.image_256.two.whole",
    "unseen pairs, one": "unseen.image_256.one.binding",
    "unseen pairs, two": "unseen.image_256.two.whole",
    "no text": "no_text_prior.image_64.one.binding",
}


def took(command: Sequence[str | Path]) -> dict[str, float]:
    """Runs a command: its wall and CPU seconds, and its greatest memory in MiB (Linux).

    Raises:
        UserError: it fails.
    """
    begin = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, command))} ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": time.monotonic() - begin, "cpu": cpu, "memory": usage.ru_maxrss / 1024}


def demo(program: Path, folder: Path, budget: str) -> dict[str, Any]:
    """What a build's demo took, summed over interruptions, with its measures."""
    file = folder / TOOK
    parts = json.loads(file.read_text()) if file.exists() else []
    if not (folder / "metrics.json").exists():
        parts.append(took([program, "demo", f"budget={budget}", f"run={folder}"]))
        write_text(file, json.dumps(parts))
    whole = {key: sum(part[key] for part in parts) for key in ("wall", "cpu")}
    return {**whole, "memory": max(part["memory"] for part in parts), **dict(_read(folder))}


def _read(folder: Path) -> Iterator[tuple[str, float]]:
    for path in sorted(folder.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        yield path.parent.name, float(Run(path.parent).metrics()[-1]["seconds"])
    metrics = json.loads((folder / "metrics.json").read_text())
    yield "evaluation", metrics["seconds"]
    for name, dotted in QUALITY.items():
        value = reduce(lambda inner, part: inner.get(part, {}), dotted.split("."), metrics)
        if value != {}:
            yield name, value


def table(before: dict[str, Any], now: dict[str, Any]) -> Table:
    """Times in seconds, memory in MiB and shares of right pictures, with the ratio of the first."""
    out = Table("", "before", "now", "ratio", title="cascade demo")
    for name in dict.fromkeys([*now, *before]):
        a, b = before.get(name), now.get(name)
        shown = [
            "" if x is None else f"{x:.1%}" if name in QUALITY else f"{x:,.0f}" for x in (a, b)
        ]
        ratio = "" if name in QUALITY or not (a and b) else f"{b / a:.2f}"
        out.add_row(name, *shown, ratio)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="the other build's `cascade`")
    parser.add_argument("--budget", default="default", choices=["default", "smoke"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_demo"))
    args = parser.parse_args(argv)
    builds = {"before": args.before.absolute(), "now": OWN}
    found = {name: demo(path, args.out / name, args.budget) for name, path in builds.items()}
    Console().print(table(found["before"], found["now"]))


if __name__ == "__main__":
    main()
