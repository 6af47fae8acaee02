"""What a logger is: a place beyond the run's own files where a training is shown.

A run's own files (metrics.csv, samples/, config.yaml) are always written, and they alone are read
again. Keys and passwords come from the environment or from the package's own files, never from a
configuration; what is logged, or said of an error, goes through `without_secrets`.
"""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from cascade.errors import UserError
from cascade.runs.run import Run

_SECRET = re.compile("KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")  # in names of environment variables
_IN_URL = re.compile(r"(\w[\w+.-]*://)(?:[^\s/?#]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")


@runtime_checkable
class Logger(Protocol):
    """Receives what a training reports; only the first rank calls it.

    Attributes:
        package: that it imports, which is also the name of the extra that installs it; None: none.
    """

    package: str | None

    def begin(
        self, run: Run, config: Mapping[str, Any], images: int, known: str | None
    ) -> str | None:
        """Begin or continue to log a run.

        Args:
            config: the resolved configuration, without secrets.
            images: at which the training starts or resumes.
            known: what an earlier attempt returned.

        Returns:
            By what the logged run is found again. It then keeps what earlier attempts logged, and
            gets each number of images once. None: it forgets what was logged after `images`.
        """
        ...

    def scalars(self, values: Mapping[str, float], images: int) -> None: ...

    def picture(self, name: str, sheet: Image.Image, images: int) -> None: ...

    def end(self, finished: bool) -> None:
        """Stop logging; add the run's metrics if the training is finished and not interrupted."""
        ...


def check_installed(loggers: Mapping[str, Logger]) -> None:
    """Raise UserError if the package of a logger is not installed. Nothing is imported."""
    for name, logger in loggers.items():
        if logger.package and not _installed(logger.package):
            raise UserError(
                f"logger={name} needs {logger.package}: "
                f"pip install 'cascade-diffusion[{logger.package}]'"
            )


def _installed(package: str) -> bool:
    # A folder of that name, such as the one that wandb leaves, can be imported, but has no origin.
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def without_secrets(node: Any) -> Any:
    """Return a configuration, or a text, without what may be secret.

    From URLs, users, passwords, queries and fragments are cut; of commands (`pipe:`) nothing is
    left; values of environment variables that are called KEY, TOKEN, PASSWORD, ... are replaced.
    """
    if isinstance(node, Mapping):
        return {key: without_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    if not isinstance(node, str):
        return node
    if node.startswith("pipe:"):
        return "pipe:..."
    for name, value in os.environ.items():
        if len(value) > 7 and _SECRET.search(name.upper()):
            node = node.replace(value, "...")
    return _IN_URL.sub(r"\1\2", node)
