"""A whole cascade: the trainings of its stages, and what is written beside them.

One configuration (`stages`, `budgets`, `each`, `cascade`, ...) describes it, whether one process
trains it (`cascade demo`) or a chain of jobs (`cascade launch`).
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cascade.files import write_atomically


def overrides(config: DictConfig, name: str, folder: Path, data: Path) -> list[str]:
    """Those of `cascade train` for one of the stages; the cascade's own CLIP is that of all."""
    clip = [f"clip.path={folder / 'clip'}"] if "clip" in config.stages else []
    own = [*config.stages[name], *config.budgets.get(name, []), *config.each]
    return [f"run={folder / name}", f"data.path={data}", *clip, *own]


def measured(folder: Path) -> bool:
    """Whether the report is newer than all that it is of."""
    report = folder / "report.html"
    parts = [folder / "cascade.yaml", *folder.glob("*/status.json")]
    return report.exists() and all(p.stat().st_mtime < report.stat().st_mtime for p in parts)


def write_cascade(config: DictConfig, folder: Path) -> None:
    """Writes what `cascade sample --model` reads, if it is not there."""
    path = folder / "cascade.yaml"
    if not path.exists():
        text = OmegaConf.to_yaml({"stages": config.cascade})
        write_atomically(path, lambda beside: beside.write_text(text))
