"""Personalization: the configurations of the trainings that teach a model a thing of one's own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cascade.adapters.words import check_word, tables
from cascade.batch import image_size
from cascade.data.embeddings import EMBEDDINGS
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.runs.cascade_file import CASCADE, stage_choices, stage_runs
from cascade.runs.run import Run
from cascade.stage import Stage

WORD = "textual_inversion"  # the method that learns a word
_KEPT = ("images", "warmup", "ema", "seed", "grids", "workers")  # of this training's own


@dataclass(frozen=True)
class Personal:
    """What is to be made of which stages of a model.

    Args:
        config: conf/personalize.yaml.
        stages: the runs of the stages to train, by name.
    """

    config: DictConfig
    stages: dict[str, Run]

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def side(self) -> int:
        """Of the largest pictures that a stage is trained on."""
        return max(map(self.side_of, self.stages))

    def side_of(self, name: str) -> int:
        """Of the largest pictures that this stage is trained on; 0: it is trained on none."""
        return max(self.stages[name].config.data.pictures.get("sizes") or [0])

    @property
    def clip(self) -> FrozenCLIP | None:
        """That whose embeddings a stage is trained on; None: none is."""
        for run in self.stages.values():
            if (config := run.located)["data"].get("embeddings"):
                clip, keys = config["clip"], ("checkpoint", "quick_gelu", "unit")
                return FrozenCLIP(clip["path"], **{key: clip[key] for key in keys if key in clip})
        return None

    @property
    def caption(self) -> str:
        """Of pictures that come without one."""
        noun = self.config.noun
        return " ".join(
            ["a", self.config.token, *([noun] if noun and not _word(self.config) else [])]
        )

    def training(self, name: str, own: Path, kept: Path | None) -> DictConfig:
        """The configuration of a stage's training, which `cascade train --config` resumes.

        It is that of the stage's own training, but for the samples, the optimizer and what the
        method sets.

        Args:
            own, kept: shards of the thing's pictures, and of its class's. Where the latter have no
                embeddings, they are those of `shards` beside them.
        """
        run, config = self.stages[name], OmegaConf.to_container(self.config)
        whole: Any = run.located
        stage, old = whole["stage"], whole["data"]

        def shards(path: Path) -> dict[str, Any]:
            pictures = {k: v for k, v in old["pictures"].items() if k != "conditions"}
            data = {"_target_": "cascade.data.shards.Shards", "path": str(path)}
            data |= {"seed": config["seed"], "pictures": pictures, "cache": True}
            if embeddings := old.get("embeddings"):
                has = (path / EMBEDDINGS).is_dir()
                folder = {"folder": str((path if has else path.parent / "shards") / EMBEDDINGS)}
                data["embeddings"] = {key: {**of, **folder} for key, of in embeddings.items()}
            return data

        whole |= {key: config[key] for key in _KEPT}
        whole |= {"run": str(self.out / name), "start": str(run.path), "name": name}
        whole |= {"data": shards(own), "adapter": config["adapter"], "spike": None}
        whole["few"] = {
            "kept": kept and shards(kept),
            "weight": config["preserve"],
            "taught": bool(kept),
        }
        whole["optim"] = stage["optimizer"] = config["optim"]
        whole["learning_rate"] = stage["learning_rate"] = config["learning_rate"]
        whole["micro_batch"] = config["micro_batch"] or whole.get("micro_batch")
        whole["logger"] = config["logger"] if "logger" in config else whole.get("logger")
        for node in (whole, stage):
            node |= {"batch": config["batch"], "seed": config["seed"]}
        dropped = ("teacher", "averages", "alignment", "perceptual", "faults", "embeddings")
        return OmegaConf.create({k: v for k, v in whole.items() if k not in dropped})

    def stages_of(self) -> dict[str, Any]:
        """The content of the new model's `cascade.yaml`, which names the base's runs."""
        file = cascade_file(self.config.model)
        runs, found = stage_runs(file), {}

        def here(path: Path) -> str:
            return os.path.relpath(path, self.out)

        for name, given in stage_choices(file, ()).items():
            of = dict(given or {})
            trained = name in self.stages
            whole = trained and not self.config.adapter
            of["run"] = None if whole else here(runs[name])
            if whole:
                beside = runs[name].parent
                if of.get("weaker"):
                    of["weaker"] = here(beside / of["weaker"])
            of["words"] = [here(Path(one)) for one in of.get("words") or ()]
            adapters = of.get("adapters") or ()
            of["adapters"] = [{**one, "path": here(Path(one["path"]))} for one in adapters]
            if trained and _word(self.config):
                of["words"].append(name)
            elif trained and not whole:
                of["adapters"].append({"path": name, "weight": 1.0})
            found[name] = {key: value for key, value in of.items() if value not in (None, [])}
        return {"stages": found}


def cascade_file(model: str) -> Path:
    """The file of a model that is named by its directory, or by the file."""
    path = Path(model)
    return path if path.suffix == ".yaml" else path / CASCADE


def personal(config: DictConfig) -> Personal:
    """Checks what is asked for, and chooses the stages; writes nothing.

    Raises:
        UserError: the token is a word already, no stage reads captions, a class is lacking, or a
            stage cannot be trained by the method.
    """
    check_word(config.token)
    noun = config.noun
    if noun is not None and not noun.strip():
        raise UserError("--class is empty: say what the thing is one of, such as 'toy'")
    if config.preserve < 0 or config.batch < 1 or config.kept < 1:
        raise UserError("preserve is at least 0, and batch and kept are at least 1")
    if config.preserve and not (noun or config.prompts):
        raise UserError(
            "prior preservation paints pictures of the class: give --class, or --preserve 0"
        )
    if config.preserve and config.batch % 2:
        raise UserError(f"batch={config.batch}: half of it is of the class, so give an even number")
    file = cascade_file(config.model)
    runs, choices = stage_runs(file), stage_choices(file, ())
    built = {name: _unloaded(Run(path)) for name, path in runs.items()}
    wanted = _chosen(config, file, built)
    for name in wanted:
        _check(config, name, Run(runs[name]), built[name], choices[name] or {})
    return Personal(config, {name: Run(runs[name]) for name in wanted})


def _word(config: DictConfig) -> bool:
    """Whether a word is learned."""
    return bool(config.adapter) and config.adapter._target_.endswith(".Word")


def _unloaded(run: Run) -> Any:
    with torch.device("meta"):
        return run.stage()


def _reads_captions(stage: Any) -> bool:
    return isinstance(stage, Stage) and "caption" in stage.conditioner.sources


def _chosen(config: DictConfig, file: Path, built: Mapping[str, Any]) -> list[str]:
    """The names of the stages to train."""
    readers = [name for name, stage in built.items() if _reads_captions(stage)]
    if not readers:
        raise UserError(f"{file}: no stage reads captions, so none can learn a thing's name")
    if config.stages:
        if unknown := [name for name in config.stages if name not in built]:
            raise UserError(f"--stages {unknown[0]}: the stages of {file} are {', '.join(built)}")
        if not set(config.stages) & set(readers):
            raise UserError(
                f"--stages {','.join(config.stages)}: none reads captions; add {readers[0]}"
            )
        return [name for name in built if name in config.stages]
    if _word(config):
        return readers
    painters = [name for name, stage in built.items() if image_size(stage.writes)]
    names = list(built)
    return names[: names.index(painters[0]) + 1] if painters else names


def _check(config: DictConfig, name: str, run: Run, stage: Any, choices: Mapping[str, Any]) -> None:
    """Raises UserError if a stage cannot be trained by the method."""
    if not run.weights:
        raise UserError(f"{run.path} has no weights: train it first")
    if run.config.get("teacher"):
        raise UserError(f"{run.path} was distilled: personalize the run that it learned from")
    lost = ("length",) if config.adapter else ("length", "controls", "words", "adapters")
    if wrong := [key for key in lost if choices.get(key)]:
        raise UserError(
            f"{name} is sampled with {wrong[0]}, which does not fit weights that are trained on: "
            + ("run `cascade average` first" if wrong[0] == "length" else "choose --method lora")
        )
    if _word(config):
        if not _reads_captions(stage):
            raise UserError(f"--stages {name}: it reads no captions, so it learns no word")
        list(tables(stage))
