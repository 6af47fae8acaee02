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
from cascade.verbs.overrides import assigned
from cascade.verbs.signatures import ANYTHING, Type, parameters
from cascade.verbs.values import conform

CASCADE = "cascade.yaml"
CHOICES = Type(fields="cascade.verbs.sample.chosen")


def overrides(config: DictConfig, name: str, folder: Path, data: Path) -> list[str]:
    """Those of `cascade train` for one of the stages; the cascade's own CLIP is that of all."""
    clip = [assigned("clip.path", folder / "clip")] if "clip" in config.stages else []
    own = [*config.stages[name], *config.budgets.get(name, []), *config.each]
    return [assigned("run", folder / name), assigned("data.path", data), *clip, *own]


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
        name: file.parent / ((of or {}).get("run") or name)
        for name, of in stage_choices(file, choices).items()
    }


def stage_choices(file: Path, choices: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """What a cascade's file says of each stage, and what takes its place."""
    stages = loaded(file).stages
    for choice in choices:
        name, option, value = parsed_choice(choice)
        if name not in stages:
            raise UserError(f"--set {choice}: not STAGE.OPTION=VALUE of {', '.join(stages)}")
        stages[name] = {**(stages[name] or {}), option: value}
    conform(stages, Type(values=CHOICES))
    return OmegaConf.to_container(stages)


def parsed_choice(choice: str) -> tuple[str, str, Any]:
    """Stage, option and value of a sampling choice; what is a name is the text as it stands.

    Raises:
        UserError: it is no such thing.
    """
    path, _, text = choice.partition("=")
    name, _, option = path.partition(".")
    if not name or not option or not text:
        raise UserError(f"--set {choice}: not STAGE.OPTION=VALUE")
    wanted = parameters(CHOICES.fields).get(option, ANYTHING)
    if "str" in wanted.plain:
        return name, option, text
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
    except YAMLError:
        raise UserError(f"--set {choice}: {text} is no number, word or list") from None
    return name, option, value
