"""What an importer makes of another system's stage, and how it becomes a run directory."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from cascade.config.compose import built, composed, saved
from cascade.config.overrides import assigned
from cascade.encoders.weights import NotHere, check_tensors, weights_hash
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text
from cascade.interop.names.rules import Rule, renamed
from cascade.nets.prior import Places
from cascade.runs.run import CONFIG
from cascade.stage import WEIGHTS, Stage

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Where a run's weights come from.

    Attributes:
        system: the published system, and which part of it.
        license: of the weights.
        files: hashes of the files that were read, by name.
        unused: tensors that were left out, by pattern, and why.
    """

    system: str
    license: str
    files: Mapping[str, str]
    unused: Mapping[str, str]


@dataclass(frozen=True)
class Imported:
    """A stage of another system in our terms.

    Attributes:
        experiment: in `conf/experiment/`: all that is the same in each size of the system.
        settings: values read from the files, by dotted names of the configuration.
        tensors: by the system's names.
        rules: how they become the tensors of the stage that the configuration builds.
        system, license: for the record (`Origin`).
        files: that were read.
        constants: further tensors, by the names of our stage.
        unused: foreign tensors that are left out, by pattern, and why.
    """

    experiment: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    rules: Callable[[Any], Iterable[Rule]]
    system: str
    license: str
    files: Sequence[Path]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)

    def config(self, run: Path, overrides: Sequence[str] = ()) -> DictConfig:
        """The run's configuration, which `cascade train` could have composed as well."""
        # "++": the experiment need not have the key.
        read = [f"++{assigned(key, value)}" for key, value in self.settings.items()]
        chosen = [f"experiment={self.experiment}", assigned("run", run), "data.path=none"]
        return composed("train", [*chosen, *read, *overrides])

    def write(self, run: Path, overrides: Sequence[str] = ()) -> Stage:
        """Write the run directory, whole or not at all; returns the stage, on meta.

        Raises:
            UserError: the directory exists, or tensors and configuration do not fit.
        """
        if run.exists():
            raise UserError(f"{run} exists: choose another --out")
        stage, write = self.writer(run, overrides)
        write_atomically(run, write)
        return stage

    def writer(
        self, run: Path, overrides: Sequence[str] = ()
    ) -> tuple[Stage, Callable[[Path], None]]:
        """The stage, on meta, and what writes its run into a folder that is then moved to `run`.

        Args:
            overrides: of the configuration; they have the last word.

        Raises:
            UserError: tensors and configuration do not fit.
        """
        config = self.config(run, overrides)
        with torch.device("meta"):
            stage: Stage = built(config.stage)
        tensors = self._ours(stage)
        about = {"encoders": json.dumps(_hashes(stage))}
        files = {path.name: weights_hash([path]) for path in self.files}
        origin = Origin(self.system, self.license, files, self.unused)

        def write(folder: Path) -> None:
            folder.mkdir()
            saved(config, folder / CONFIG)
            write_text(folder / ORIGIN, json.dumps(asdict(origin), indent=2) + "\n")
            save_file(tensors, folder / WEIGHTS, about)

        return stage, write

    def _ours(self, stage: Stage) -> dict[str, Tensor]:
        """The tensors of the stage, made of the foreign ones."""
        where = str(self.files[0])
        ours = renamed(self.tensors, self.rules(stage), where, self.unused) | dict(self.constants)
        expected = stage.state_dict()
        ours |= {k: torch.tensor(Places.VERSION) for k in expected if k.endswith(Places.KEY)}
        check_tensors(expected, ours, where, self.system)
        return {k: v.contiguous().clone() for k, v in ours.items()}


def _hashes(stage: Stage) -> list[str]:
    """The hashes of the stage's encoders; none if one is not on this machine, unlike its weights.

    `Stage.restore` compares those that are recorded.
    """
    try:
        return [encoder.hash for encoder in stage.encoders]
    except NotHere:
        return []
