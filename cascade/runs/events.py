"""Record the timeline of a run: starts, interruptions, skipped steps, rollbacks."""

import json
import time
from pathlib import Path
from typing import Any

from cascade.runs.run import Run


def event(run: Path, kind: str, **facts: Any) -> None:
    """Append one line of JSON: `time` (seconds since 1970), `event` and further facts."""
    line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts})
    with Run(run).events.open("a") as file:
        file.write(line + "\n")
