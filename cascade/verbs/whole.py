"""A whole cascade: the trainings of its stages, and what is written beside them.

One configuration (`stages`, `budgets`, `each`, `cascade`, ...) describes it, whether one process
trains it (`cascade demo`) or a chain of jobs (`cascade launch`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.verbs.configuration import loaded

CASCADE = "cascade.yaml"


def overrides(config: DictConfig, name: str, folder: Path, data: Path) -> list[str]:
    """Those of `cascade train` for one of the stages; the cascade's own CLIP is that of all."""
    clip = [f"clip.path={folder / 'clip'}"] if "clip" in config.stages else []
    own = [*config.stages[name], *config.budgets.get(name, []), *config.each]
    return [f"run={folder / name}", f"data.path={data}", *clip, *own]


def measured(folder: Path) -> bool:
    """Whether the report is newer than all that it is of."""
    report = folder / "report.html"
    parts = [folder / CASCADE, *folder.glob("*/status.json")]
    return report.exists() and all(p.stat().st_mtime < report.stat().st_mtime for p in parts)


def write_cascade(config: DictConfig, folder: Path) -> None:
    """Writes what `cascade sample --model` reads, if it is not there."""
    path = folder / CASCADE
    if not path.exists():
        text = OmegaConf.to_yaml({"stages": config.cascade})
        write_atomically(path, lambda beside: beside.write_text(text))


def stage_runs(file: Path, choices: Sequence[str] = ()) -> dict[str, Path]:
    """The runs of a cascade's stages, by name, in order."""
    return {
        name: file.parent / (of or {}).get("run", name)
        for name, of in stage_choices(file, choices).items()
    }


def stage_choices(file: Path, choices: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """What a cascade's file says of each stage, and what takes its place."""
    stages = OmegaConf.to_container(loaded(file).stages)
    for choice in choices:
        path, _, value = choice.partition("=")
        name, _, option = path.partition(".")
        if name not in stages or not option or not value:
            raise UserError(f"--set {choice}: not STAGE.OPTION=VALUE of {', '.join(stages)}")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([f"{option}={value}"]))
        except YAMLError:
            raise UserError(f"--set {choice}: {value} is no number, word or list") from None
        stages[name] = {**(stages[name] or {}), **given}
    return stages
