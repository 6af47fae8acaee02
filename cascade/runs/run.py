"""A training: its directory with all files, and how far it has got.

The names of its files are written down here and nowhere else. Importing this module is cheap, so
that many runs can be listed in a moment; Hydra and torch are imported by the methods that need
them.
"""

import csv
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from cascade.files.atomic import write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

CASCADE = "cascade.yaml"  # in the folder that holds the runs of a cascade
CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.csv"
EVENTS = "events.jsonl"
CHECKPOINTS = "checkpoints"
AVERAGES = "averages"
SAMPLES = "samples"
TENSORBOARD, WANDB, MLFLOW = "tensorboard", "wandb", "mlflow"  # folders of loggers
HEARTBEATS = "heartbeats"
LOGGED = "logged.json"


class Saved(NamedTuple):
    """A checkpoint on disk, whole or damaged, or a snapshot of averages: its step and its place.

    The first versions wrote a checkpoint as a file instead of a directory.
    """

    step: int
    path: Path


@dataclass(frozen=True)
class Run:
    """The directory of one training, which may not exist yet.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def config(self) -> "DictConfig":
        """The resolved configuration. UserError if there is none, or if it is damaged."""
        from cascade.config.compose import loaded

        return loaded(self.config_file)

    @property
    def status_file(self) -> Path:
        return self.path / STATUS

    def status(self) -> dict[str, int]:
        """`images` seen at the last checkpoint and `total`; empty if missing or damaged."""
        try:
            found = json.loads(self.status_file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_status(self, images: int, total: int) -> None:
        write_text(self.status_file, json.dumps({"images": images, "total": total}) + "\n")

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS

    def metrics(self) -> list[dict[str, str]]:
        """The rows of the metrics; empty if there are none. A torn last line is left out."""
        try:
            with self.metrics_file.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []
        return list(csv.DictReader(whole))

    @property
    def events(self) -> Path:
        """The timeline, one JSON object per line (`event`)."""
        return self.path / EVENTS

    @property
    def weights(self) -> list[Path]:
        """The exported weights of the average: one file, or none before the first checkpoint."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def samples(self) -> Path:
        """The folder of the grids that were sampled during training."""
        return self.path / SAMPLES

    @property
    def tensorboard(self) -> Path:
        return self.path / TENSORBOARD

    def logged(self) -> dict[str, dict[str, Any]]:
        """Of each logger that keeps runs elsewhere, the run's `id` there, and the `images` up to
        which it had everything when the last attempt began; empty if missing or damaged."""
        try:
            return json.loads((self.path / LOGGED).read_text())
        except (OSError, ValueError):
            return {}

    def write_logged(self, found: dict[str, dict[str, Any]]) -> None:
        write_text(self.path / LOGGED, json.dumps(found) + "\n")

    def heartbeat(self, rank: int) -> Path:
        """The file that a rank touches while it is alive."""
        return self.path / HEARTBEATS / f"rank{rank}.json"

    def last_heartbeat(self) -> float | None:
        """When any rank touched its heartbeat last (seconds since 1970); None if none ever did."""
        beats = (self.path / HEARTBEATS).glob("rank*.json")
        return max((path.stat().st_mtime for path in beats), default=None)

    @property
    def checkpoint_folder(self) -> Path:
        return self.path / CHECKPOINTS

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of an optimizer step is written."""
        return self.checkpoint_folder / f"step-{step:08d}"

    def checkpoints(self) -> list[Saved]:
        """All checkpoints, oldest first, without a look inside; those set aside are left out."""
        return _saved(self.checkpoint_folder)

    @property
    def averages(self) -> Path:
        """The folder of the snapshots of averages whose length is chosen after training."""
        return self.path / AVERAGES

    def snapshot(self, step: int) -> Path:
        """Where the averages at an optimizer step are written."""
        return self.averages / f"step-{step:08d}.safetensors"

    def snapshots(self) -> list[Saved]:
        """All snapshots of averages, oldest first."""
        return _saved(self.averages)

    def stage(self) -> Any:
        """Build the module that this run trains, with fresh weights.

        Its encoders are looked for where they are now (`located`).
        """
        from cascade.config.compose import built

        return built(self.located["stage"])

    @property
    def located(self) -> dict[str, Any]:
        """The configuration, with the paths of its encoders where they are now.

        A path that begins with `../` counts from the run's directory, as in an exported model. If
        the run was moved and its CLIP or autoencoder is not at the configured path, a folder of
        that name next to the run is used. `load` compares the hashes of encoders.
        """
        from omegaconf import OmegaConf

        from cascade.runs.resumable import replaced

        config: Any = OmegaConf.to_container(self.config)
        paths = {of: str((config.get(of) or {}).get("path")) for of in ("clip", "autoencoder")}
        codec = config["stage"].get("codec") or {}
        readers = [*(config["stage"].get("encoders") or []), codec.get("autoencoder") or {}]
        named = {str(r.get(k, "")) for r in readers for k in ("path_or_name", "folder")}
        for path in sorted({*paths.values(), *named}):
            if path.startswith("../") and (self.path / path).exists():
                config = replaced(config, path, str(self.path / path))
        for of, path in paths.items():
            moved, found = self.path.parent / Path(path).name, config.get(of) or {}
            if found.get("path") == path and not Path(path).exists() and moved.is_dir():
                config = replaced(config, path, str(moved))
        return config

    def load(self) -> Any:
        """Build the module with the average's weights, in `eval()` mode.

        Raises:
            UserError: there are no weights, or they do not fit the configuration or its encoders.
        """
        module = self.stage()
        module.restore(self.path)
        return module.eval()


@dataclass(frozen=True)
class Position:
    """A place in a run, between two optimizer steps.

    Images and consumed samples differ after a rollback only: the loss spike's samples are never
    used again, but the steps that consumed them are taken again, with later samples.

    Args:
        step: optimizer steps so far, skipped ones included.
        batch: global batch size.
        offset: samples that rollbacks have passed over.
    """

    step: int
    batch: int
    offset: int = 0

    @property
    def images(self) -> int:
        """Images trained on: progress, the learning rate and the end of a run go by it."""
        return self.step * self.batch

    @property
    def consumed(self) -> int:
        """Samples read by all ranks together, which is the number of the next sample."""
        return self.images + self.offset

    def at(self, step: int) -> "Position":
        """Return the position after another number of steps, with no further rollback."""
        return replace(self, step=step)


def _saved(folder: Path) -> list[Saved]:
    named = ((re.match(r"step-(\d+)", path.name), path) for path in folder.glob("*"))
    return sorted(Saved(int(name[1]), path) for name, path in named if name)


def event(run: Path, kind: str, **facts: Any) -> None:
    """Append one line to the timeline of a run: `time` (seconds since 1970), `event` and facts."""
    line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts})
    with Run(run).events.open("a") as file:
        file.write(line + "\n")


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of a run or a cascade, quickly; None if it is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return None
