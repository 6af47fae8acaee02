"""The file `cascade.yaml`: the stages of a cascade, their runs and their sampling choices.

One configuration (`stages`, `budgets`, `each`, `cascade`, ...) describes the trainings of a whole
cascade, whether one process runs them (`cascade demo`) or a chain of jobs (`cascade launch`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from cascade.config.compose import loaded
from cascade.config.overrides import assigned
from cascade.config.signatures import ANYTHING, Type, parameters
from cascade.config.values import conform
from cascade.errors import UserError
from cascade.files.atomic import write_text
from cascade.runs.run import CASCADE, STATUS

CHOICES = Type(fields="cascade.runs.choices.SamplingChoices")


def overrides(config: DictConfig, name: str, folder: Path, data: Path) -> list[str]:
    """The overrides of `cascade train` for one stage. All stages share the CLIP of the cascade."""
    clip = [assigned("clip.path", folder / "clip")] if "clip" in config.stages else []
    own = [*config.stages[name], *config.budgets.get(name, []), *config.each]
    return [assigned("run", folder / name), assigned("data.path", data), *clip, *own]


def measured(folder: Path) -> bool:
    """Whether the report is newer than the cascade file and all runs."""
    report = folder / "report.html"
    parts = [folder / CASCADE, *folder.glob(f"*/{STATUS}")]
    return report.exists() and all(p.stat().st_mtime < report.stat().st_mtime for p in parts)


def write_cascade(config: DictConfig, folder: Path) -> None:
    """Write `cascade.yaml`, unless it exists."""
    path = folder / CASCADE
    if not path.exists():
        write_text(path, OmegaConf.to_yaml({"stages": config.cascade}))


def stage_runs(file: Path, choices: Sequence[str] = ()) -> dict[str, Path]:
    """The run directory of each stage, in order."""
    return {
        name: file.parent / ((of or {}).get("run") or name)
        for name, of in stage_choices(file, choices).items()
    }


def companions(file: Path, choices: Sequence[str] = ()) -> dict[str, Path]:
    """The further runs that sampling choices name: STAGE.weaker, and each STAGE.controls.RUN,
    STAGE.words.RUN and STAGE.adapters.RUN."""
    runs, found = stage_runs(file, choices), {}
    for name, of in stage_choices(file, choices).items():
        beside, of = runs[name].parent, of or {}
        found |= {f"{name}.weaker": beside / of["weaker"]} if of.get("weaker") else {}
        found |= {f"{name}.controls.{one}": beside / one for one in of.get("controls") or ()}
        found |= {f"{name}.words.{one}": Path(one) for one in of.get("words") or ()}
        paths = [one["path"] for one in of.get("adapters") or () if "path" in one]
        found |= {f"{name}.adapters.{one}": Path(one) for one in paths}
    return found


def stage_choices(file: Path, choices: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """The choices of each stage (None: it has none): those of the file, overridden by `choices`.

    Paths of words and adapters, which count from the file, are joined to its folder.
    """
    stages = loaded(file).stages
    for choice in choices:
        name, option, value = parsed_choice(choice)
        if name not in stages:
            raise UserError(f"--set {choice}: not STAGE.OPTION=VALUE of {', '.join(stages)}")
        stages[name] = {**(stages[name] or {}), option: value}
    conform(stages, Type(values=CHOICES))
    found: Any = OmegaConf.to_container(stages)
    for of in filter(None, found.values()):
        if of.get("words"):
            of["words"] = [str(file.parent / one) for one in of["words"]]
        for one in of.get("adapters") or ():
            if isinstance(one, dict) and "path" in one:
                one["path"] = str(file.parent / str(one["path"]))
    return found


def parsed_choice(choice: str) -> tuple[str, str, Any]:
    """Parse "stage.option=value" into its three parts. Names are kept as they are, without YAML.

    Raises:
        UserError: it does not have this form.
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
