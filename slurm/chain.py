"""Trainings as tasks: one alone, or a whole cascade as a chain of task groups.

Each group of the chain waits for those that it needs:

    scenes -> super-resolution, autoencoder, judge -> evaluation
    scenes -> CLIP -> embeddings -> prior, decoder -> evaluation

Every task has a subdirectory of the cascade's directory. Finished tasks are skipped, so the same
command, repeated after a failure, runs only what is missing.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.config.checks import accumulation, check_split
from cascade.config.compose import built, composed
from cascade.data.embeddings import MANIFEST
from cascade.data.tars.tar import tars_of
from cascade.errors import UserError
from cascade.files.atomic import check_writable
from cascade.files.stores.places import on_disk
from cascade.runs import cascade_file
from cascade.runs.done import DONE, FROZEN, finished
from cascade.runs.resumable import check_resumable
from cascade.runs.run import Run
from cascade.runs.start import training
from cascade.slurm.plan import Launcher, Task, TaskGroup, launch

LAUNCHER = "launcher"
_SCENES = 1000  # per shard, as `write_scenes` writes them
_REFERRED = ("clip", "text", "autoencoder")


def split(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of some keys, including nested ones, and the others."""

    def ours(override: str) -> bool:
        path = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]
        return f"{path}.".startswith(tuple(f"{key}." for key in keys))

    return [o for o in overrides if ours(o)], [o for o in overrides if not ours(o)]


def training_task(
    overrides: Sequence[str], launcher: Launcher, resources: Mapping[str, Any] | None = None
) -> tuple[Task, DictConfig]:
    """Return a training as a task, and its resolved configuration.

    Raises:
        UserError: the configuration is wrong, its directory belongs to another run, or the batch
            cannot be divided among the ranks. This is found before anything is queued.
    """
    ranks = launcher.ranks(resources or {})
    config = training([*overrides, *(f"trainer.{key}={n}" for key, n in ranks.items())])
    folder = Path(config.run).absolute()
    check_resumable(config, Run(folder))
    if ranks:
        accumulation(config.batch, config.micro_batch, math.prod(ranks.values()))
    command = ("train", "--config", str(folder / FROZEN))
    done = finished(folder, config.images)
    return Task(folder, command, OmegaConf.to_yaml(config, resolve=True), done), config


def submit_training(own: Sequence[str], overrides: Sequence[str]) -> None:
    """Submit one training; `own` are the overrides that choose the launcher."""
    launcher = built(composed("launcher", own).launcher)
    task, _ = training_task(overrides, launcher)
    check_writable(task.folder, "choose another run=...")
    launch(launcher, task.folder, [TaskGroup("train", [task])])


def submit_cascade(overrides: Sequence[str]) -> None:
    """Submit everything that a whole cascade still lacks; `overrides` are those of `launch`."""
    config = composed("launch", overrides)
    launcher, root = built(config.launcher), Path(config.run)
    check_writable(root, "choose another run=...")
    groups = chain(config, launcher)
    cascade_file.write_cascade(config, root)
    launch(launcher, root, groups)


def chain(config: DictConfig, launcher: Launcher) -> list[TaskGroup]:
    """Return the groups of a cascade, each after those that it needs.

    Raises:
        UserError: a stage's configuration is wrong, its directory belongs to another run, or the
            shards lack a split that is measured.
    """
    root, data = Path(config.run), on_disk(config.data.path, "whole cascades are measured")
    for split in () if config.scenes else config.evaluate.counts:
        check_split(data, split)
    asked = {name: cascade_file.overrides(config, name, root, data) for name in config.stages}
    groups = trainings(config, root, asked, launcher)
    ended = all(task.done for group in groups for task in group.tasks)
    tasks, after = [_evaluation(config, root, data, ended)], [group.name for group in groups]
    resources = OmegaConf.to_container(config.resources).get("evaluation", {})
    return [*groups, TaskGroup("evaluation", tasks, after, alone=True, resources=resources)]


def trainings(
    config: DictConfig, root: Path, asked: Mapping[str, Sequence[str]], launcher: Launcher
) -> list[TaskGroup]:
    """Return trainings by name, each after the scenes, trainings and embeddings that it reads.

    Args:
        config: supplies `data`, `scenes`, `seed`, `precompute` and `resources`.
        root: directory for the tasks that write scenes and embeddings.
        asked: the overrides of each training.
    """
    data, resources = Path(config.data.path), OmegaConf.to_container(config.resources)
    trained = {
        name: training_task(own, launcher, resources.get(name)) for name, own in asked.items()
    }
    folders = {task.folder: name for name, (task, _) in trained.items()}
    # One training's configuration for each store of embeddings; all that read a store agree.
    stores = {n: own for _, own in trained.values() for n in own.data.get("embeddings") or {}}
    after = {name: _read_by(own, folders) for name, (_, own) in trained.items()}
    tasks = {name: [task] for name, (task, _) in trained.items()}
    if stores:
        clips = [Path(own.clip.path).absolute() for own in stores.values()]
        after["precompute"] = [name for folder, name in folders.items() if folder in clips]
        tasks["precompute"] = [_precompute(stores, root, data, i) for i in range(config.precompute)]
    if config.scenes:
        tasks["scenes"] = [_scenes(config, root, data)]
        after = {"scenes": [], **{name: ["scenes", *others] for name, others in after.items()}}
    alone = {"scenes", "precompute"}
    return [
        TaskGroup(name, tasks[name], after[name], name in alone, resources.get(name, {}))
        for name in _in_order(after)
    ]


def _read_by(config: DictConfig, folders: Mapping[Path, str]) -> list[str]:
    """Return the names of what a training reads: trainings by their `folders`, and "precompute"."""
    plain = OmegaConf.to_container(config)
    # The groups that others refer to name a path whether or not this training reads it.
    read = {key: one for key, one in plain.items() if key not in ("run", *_REFERRED)}
    paths = [Path(text).absolute() for text in _texts(read)]
    found = [
        name for folder, name in folders.items() if any(p.is_relative_to(folder) for p in paths)
    ]
    return [*found, "precompute"] if config.data.get("embeddings") else found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.values()])
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _in_order(after: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names, each after those that it waits for.

    Raises:
        UserError: some wait for one another.
    """
    try:
        return [*TopologicalSorter(after).static_order()]
    except CycleError as error:
        circle = " and ".join(error.args[1][:-1])
        raise UserError(f"{circle} read one another's directories: change a path") from error


def _task(folder: Path, command: Sequence[object], done: bool) -> Task:
    return Task(folder.absolute(), [str(word) for word in command], done=done)


def _scenes(config: DictConfig, root: Path, data: Path) -> Task:
    scenes = config.scenes
    counts = [word for split, count in scenes.counts.items() for word in (f"--{split}", count)]
    how = ["--level", scenes.level, "--size", scenes.size, "--seed", config.seed]
    folder = root / "scenes"

    def there() -> bool:
        shards = ((split, -(-count // _SCENES)) for split, count in scenes.counts.items())
        return all(len([*data.glob(f"{split}-*.tar")]) >= count for split, count in shards)

    done = finished(folder, there=there)
    return _task(folder, ["data", "scenes", data, *how, *counts], done)


def _precompute(stores: Mapping[str, DictConfig], root: Path, data: Path, number: int) -> Task:
    """Return one of the tasks that share the embedding of all shards."""
    folder = root / "precompute" / str(number)
    folders = [own.data.embeddings[name].folder for name, own in stores.items()]
    done = finished(folder, there=lambda: all(_embedded(data, Path(of)) for of in folders))
    command = ["data", "precompute", data]
    if own := stores.get("clip"):
        command += ["--clip", own.clip.path, "--out", own.data.embeddings.clip.folder]
        command += _named(own.clip)
        status = Run(Path(own.clip.path)).status_file
        if done and status.exists():  # embeddings of an earlier CLIP are out of date
            done = status.stat().st_mtime < (folder / DONE).stat().st_mtime
    if own := stores.get("text"):
        reader = own.text.reader
        command += ["--text", reader.path_or_name, "--text-out", own.data.embeddings.text.folder]
        command += [] if "--checkpoint" in command else _named(reader)
        command += ["--length", reader.length] if "length" in reader else []
        command += ["--captions", ",".join(own.data.captions)] if "captions" in own.data else []
        command += ["--several", own.data.several] if own.data.get("several") else []
        if (written := own.data.get("recaptions")) and (Path(written) / MANIFEST).exists():
            command += ["--recaptions", str(written)]
    return _task(folder, command, done)


def _named(clip: DictConfig) -> list[str]:
    """Return the options that `data precompute` needs for a CLIP given by name."""
    quick = clip.get("quick_gelu")
    words = ["--checkpoint", clip.checkpoint] if clip.get("checkpoint") else []
    return [*words, *([] if quick is None else ["--quick-gelu", str(quick).lower()])]


def _embedded(data: Path, folder: Path) -> bool:
    """Return whether every shard has its embeddings."""
    tars = {path.stem for path in tars_of(data)}
    return bool(tars) and tars <= {path.stem for path in folder.glob("*.safetensors")}


def _evaluation(config: DictConfig, root: Path, data: Path, ended: bool) -> Task:
    asked = {"model": str(root), "data": str(data), "judge": config.judge, "seed": config.seed}
    asked |= OmegaConf.to_container(config.evaluate)
    folder = (root / "evaluation").absolute()
    done = ended and cascade_file.measured(root)
    command = ("evaluate", "--config", str(folder / FROZEN))
    return Task(folder, command, OmegaConf.to_yaml(asked), done)
