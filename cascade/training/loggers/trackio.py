"""Trackio, which keeps runs on this machine (in TRACKIO_DIR; `trackio show` shows them)."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from PIL import Image

from cascade.runs.run import Run


class Trackio:
    """Logs a run to Trackio. A resumed run has the same name.

    Args:
        project: of Trackio.
    """

    package = "trackio"

    def __init__(self, project: str = "cascade"):
        self.project = project

    def begin(
        self, run: Run, config: Mapping[str, Any], images: int, known: str | None
    ) -> str | None:
        import trackio

        self.run, self.trackio = run, trackio
        logged = trackio.init(
            project=self.project,
            name=known or _name(run),
            config=dict(config),
            resume="allow" if known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return logged.name

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        self.trackio.log(dict(values), step=images)

    def picture(self, name: str, sheet: Image.Image, images: int) -> None:
        self.trackio.log({name: self.trackio.Image(sheet)}, step=images)

    def end(self, finished: bool) -> None:
        if finished:
            self.trackio.log_artifact(self.run.metrics_file, type="metrics")
        self.trackio.finish()


def _name(run: Run) -> str:
    """Return a name that no other run has: Trackio finds runs by name, and names folders so."""
    place = "-".join(run.path.absolute().parts[-2:])
    return re.sub(r"[^\w.-]+", "_", place) + f"-{uuid4().hex[:6]}"
