"""The timeline of a run, `events.jsonl`: starts, interruptions, skipped steps, rollbacks."""

import json
import time
from pathlib import Path
from typing import Any


def event(run: Path, kind: str, **facts: Any) -> None:
    """Appends one line: the time (seconds since 1970), what happened, and the facts given."""
    line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts})
    with (run / "events.jsonl").open("a") as file:
        file.write(line + "\n")
