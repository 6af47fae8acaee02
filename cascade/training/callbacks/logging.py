"""Passes what a training reports to its loggers, on the first rank alone.

A logger that fails while the run trains is dropped, and the training goes on: the run's own files
have everything. One that cannot begin ends the run at once, before anybody relies on it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from PIL import Image

from cascade.errors import UserError
from cascade.runs.run import Position, Run, event
from cascade.training.loggers.logger import Logger, without_secrets


class Open(NamedTuple):
    """A logger that has begun, and the number of images up to which it has everything."""

    logger: Logger
    logged: int


class Logging(L.Callback):
    """Begins the loggers, passes scalars and pictures to them, and ends them.

    Runs before the callbacks that report (`scalars`, `picture`), which do so on the first rank.

    Args:
        run: the run's directory, which keeps by what each logged run is found again.
        loggers: by name.
        config: the resolved configuration.
        start: where this process starts or resumes.
    """

    def __init__(
        self, run: Path, loggers: Mapping[str, Logger], config: Mapping[str, Any], start: Position
    ):
        self.run, self.loggers, self.config, self.start = run, loggers, config, start
        self.open: dict[str, Open] = {}

    def setup(self, trainer, module, stage: str) -> None:
        if not trainer.is_global_zero or not self.loggers:
            return
        run, config = Run(self.run), without_secrets(self.config)
        before, rows = run.logged(), run.metrics()
        last = int(rows[-1]["images"]) if rows else -1
        found = {}
        for name, logger in self.loggers.items():
            known = before.get(name, {})
            try:
                of = logger.begin(run, config, self.start.images, known.get("id"))
            except Exception as error:
                raise _failed(name, error) from None
            logged = -1
            if of is not None:
                again = of == known.get("id")
                logged = max(last, known["images"]) if again else -1
                found[name] = {"id": of, "images": logged}
            self.open[name] = Open(logger, logged)
        if found:
            run.write_logged({**before, **found})

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        self._each(lambda logger: logger.scalars(values, images), images)

    def picture(self, name: str, sheet: Image.Image, images: int) -> None:
        self._each(lambda logger: logger.picture(name, sheet, images), images)

    def teardown(self, trainer, module, stage: str | BaseException) -> None:
        finished = stage == "fit" and trainer.global_step >= trainer.max_steps
        self._each(lambda logger: logger.end(finished))
        self.open = {}

    on_exception = teardown  # after an error, Lightning calls no teardown

    def _each(self, call: Callable[[Logger], None], images: int | None = None) -> None:
        for name, (logger, logged) in list(self.open.items()):
            if images is not None and images <= logged:
                continue
            try:
                call(logger)
            except Exception as error:
                del self.open[name]
                print(f"{self.run}: {_said(name, error)}; the training goes on without it")
                event(self.run, "logger failed", logger=name, error=type(error).__name__)


def _failed(name: str, error: Exception) -> UserError:
    return UserError(f"{_said(name, error)}: correct it, or choose another logger=...")


def _said(name: str, error: Exception) -> str:
    line = without_secrets(" ".join(str(error).split()))[:200]
    return f"logger={name} failed ({type(error).__name__}: {line})"
