"""Event files for TensorBoard, in `tensorboard/` of the run's directory."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from cascade.runs.run import Run


class TensorBoard:
    """Writes events; those after the checkpoint that a run resumes from are hidden."""

    package = None

    def begin(
        self, run: Run, config: Mapping[str, Any], images: int, known: str | None
    ) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.images = run, images
        self.board = SummaryWriter(str(run.tensorboard), purge_step=images + 1)
        if not images:
            self._write("config", json.dumps(config, indent=2), 0)
        return None

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        self.images = images
        for key, value in values.items():
            self.board.add_scalar(key, value, images)

    def picture(self, name: str, sheet: Image.Image, images: int) -> None:
        self.board.add_image(name, np.asarray(sheet.convert("RGB")), images, dataformats="HWC")

    def end(self, finished: bool) -> None:
        if finished and (rows := self.run.metrics()):
            self._write("metrics", json.dumps(rows[-1], indent=2), self.images)
        self.board.close()

    def _write(self, name: str, text: str, images: int) -> None:
        self.board.add_text(name, f"```\n{text}\n```", images)
