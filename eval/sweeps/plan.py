"""The plan of a sweep: a question, answered by a grid.

    shared trainings -> the points' trainings -> measurement of every point, cell by cell -> report

A point is one value of each of the `axes`, and a seed; a cell is a point sampled with one value of
each of the `choices`. A point's folder, named after its position in the grid, is its identity: the
same command run again does only what is missing. Trainings that points share are kept in `home`,
outside the sweep, where other sweeps find them.
"""

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.config.checks import check_split
from cascade.config.compose import built, composed
from cascade.config.overrides import assigned
from cascade.data.tars.splits import HELD_OUT, described
from cascade.errors import UserError
from cascade.eval.sweeps import rungs
from cascade.eval.sweeps.folder import Point, point_name, report_task, setting_of, write_about
from cascade.files.atomic import check_writable, write_atomically
from cascade.files.stores.places import on_disk
from cascade.runs.cascade_file import CASCADE, parsed_choice
from cascade.runs.done import DONE, FROZEN, finished
from cascade.runs.run import Run
from cascade.slurm.chain import LAUNCHER, split, training_task, trainings
from cascade.slurm.plan import Launcher, Task, TaskGroup, launch

# Overrides of the sweep itself; all others apply to the training of each point.
_OWN = (
    *("sweep", LAUNCHER, "home", "run", "scenes", "shared", "needs", "base", "axes", "seeds"),
    *("train", "cascade", "instead", "choices", "evaluate", "judge", "precompute", "resources"),
    *("data.path", "rungs", "rung_measure"),
)


def planned_sweep(given: Sequence[str]) -> tuple[list[TaskGroup], Launcher]:
    """Return everything that a sweep consists of, and its launcher; nothing is written."""
    own, overrides = split(given, _OWN)
    config = composed("sweep", own)
    launcher, root = built(config.launcher), Path(config.run)
    return grid(config, overrides, launcher, _next(config, root), rungs.all_cut(root)), launcher


def submit_sweep(given: Sequence[str]) -> None:
    """Submit everything that a sweep still lacks; `given` are the overrides of `cascade sweep`."""
    own, overrides = split(given, _OWN)
    config = composed("sweep", own)
    launcher, root = built(config.launcher), Path(config.run)
    check_writable(root, "choose another run=...")
    while True:
        share, cut = _next(config, root), rungs.all_cut(root)
        groups = grid(config, overrides, launcher, share, cut)
        describe(config, root)
        launch(launcher, root, groups)
        if share == 1:
            return
        left = grid(config, overrides, launcher, share, cut)[:-1]  # but the report, which is last
        if not all(task.done for group in left for task in group.tasks):
            print(f"rung {share:g}: run the same command again once these tasks have finished")
            return
        measure = rungs.measure_named(config.rung_measure)
        remain: dict[str, list[Path]] = {}
        for name, *_ in points(config):
            if setting_of(name) not in cut:
                remain.setdefault(setting_of(name), []).append(root / name)
        for name, why in rungs.decide(root, share, measure, remain, _controls(config)).items():
            print(rungs.said(name, why))


def _next(config: DictConfig, root: Path) -> float:
    """The share of the images up to which points are trained now.

    Raises:
        UserError: `rungs` do not rise from 0 to 1, are not those decided before, or have nothing
            to compare.
    """
    shares, before = list(config.rungs), [rung["share"] for rung in rungs.decided(root)]
    if sorted({*shares}) != shares or not all(0 < share < 1 for share in shares):
        raise UserError(f"rungs={shares}: give rising shares between 0 and 1")
    if shares and not (config.train and config.cascade):
        raise UserError("rungs compare trained points: give train and cascade as well")
    if before != shares[: len(before)]:
        raise UserError(f"{root} was compared at {before}: start rungs with these, or choose run=")
    rungs.measure_named(config.rung_measure)
    return [*shares, 1.0][len(before)]


def _controls(config: DictConfig) -> frozenset[str]:
    """The settings whose value of the first axis is the control."""
    names = {
        setting_of(name): next(iter(values.values()), "") for name, _, values, _ in points(config)
    }
    return frozenset(name for name, value in names.items() if value == str(config.control))


def grid(
    config: DictConfig,
    overrides: Sequence[str],
    launcher: Launcher,
    share: float = 1.0,
    cut: Collection[str] = (),
) -> list[TaskGroup]:
    """Return the task groups of a sweep.

    Args:
        overrides: overrides of every point's training, which take precedence over the sweep's.
        share: of their images that points are trained on.
        cut: settings that are left out.

    Raises:
        UserError: the sweep needs a training that `shared` lacks, a configuration is wrong, or the
            shards lack the split to measure with.
    """
    root, home = Path(config.run), Path(config.home)
    data = on_disk(config.data.path, "sweeps are measured")
    if unknown := [name for name in config.needs if name not in config.shared]:
        raise UserError(f"the sweep needs {unknown[0]}, which `shared` does not define")
    if config.axes and not config.train:
        raise UserError(
            "axes without train: name the stage that the points train, such as train=decoder"
        )
    if config.cascade and not config.scenes:
        check_split(data, config.evaluate.split)
    asked = {
        name: [*config.shared[name], assigned("run", home / name), assigned("data.path", data)]
        for name in config.needs
    }
    groups = trainings(config, home, asked, launcher)
    before, shared = [group.name for group in groups], [t for group in groups for t in group.tasks]
    tasks, measured = [], []
    for name, seed, values, own in points(config):
        if setting_of(name) in cut:
            continue
        if config.train:
            at = [assigned("run", root / name / config.train), assigned("data.path", data)]
            at.append(assigned("seed", seed))
            given = joined(config.base, overrides, own, at)
            tasks.append(_training(given, launcher, share))
        if config.cascade:
            ready = all(task.done for task in [*shared, *tasks[-1:]])
            measured.append(_measurement(config, root / name, seed, values, ready))
    resources = OmegaConf.to_container(config.resources)
    if tasks:
        groups.append(TaskGroup("sweep", tasks, before, resources=resources.get("sweep", {})))
    if measured:
        own, each = resources.get("evaluation", {}), "sweep" if tasks else None
        groups.append(TaskGroup("evaluation", measured, before, True, own, each_after=each))
        report = Task(report_task(root).absolute(), ["report", str(root)])
        groups.append(TaskGroup("report", [report], ["evaluation"], alone=True, resources=own))
    return groups


def _training(given: Sequence[str], launcher: Launcher, share: float) -> Task:
    """Return the task that trains a point on a share of its images, as a whole training begins."""
    task, own = training_task(given, launcher)
    if share == 1:
        return task
    images = round(share * own.images)
    seen = Run(task.folder).status().get("images", 0)
    if seen > images + own.batch:
        raise UserError(
            f"{task.folder} has seen {seen:,} images, more than at rung {share:g}: omit rungs"
        )
    until = [assigned("images", images)]
    if "total" in (own.learning_rate or {}):
        until.append(assigned("learning_rate.total", own.images))
    return training_task(joined(given, until), launcher)[0]


def points(config: DictConfig) -> Iterator[tuple[str, int, dict[str, str], list[str]]]:
    """Yield name, seed, values and overrides of every point, ordered by seed first."""
    axes = OmegaConf.to_container(config.axes)
    for seed in config.seeds:
        for values in itertools.product(*(axis.items() for axis in axes.values())):
            names = [str(name) for name, _ in values]
            own = [override for _, overrides in values for override in overrides]
            yield point_name(names, seed), seed, dict(zip(axes, names)), own


def joined(*parts: Sequence[str]) -> list[str]:
    """Concatenate overrides; of several for one key, keep the last."""
    return list({o.partition("=")[0].lstrip("+"): o for part in parts for o in part}.values())


def describe(config: DictConfig, root: Path) -> None:
    """Write sweep.json and each point's cascade.yaml, which the report and `sample` read."""
    grids = {part: OmegaConf.to_container(config[part]) for part in ("axes", "choices")}
    about = {key: config[key] for key in ("name", "question", "paper", "along", "control")}
    about |= {part: {axis: list(of) for axis, of in grid.items()} for part, grid in grids.items()}
    about |= {part: OmegaConf.to_container(config[part]) for part in ("at", "expected")}
    about |= {"seeds": list(config.seeds), "features": "picture embeddings of the CLIP that judges"}
    if cut := rungs.all_cut(root):
        about["cut"] = {name: list(why) for name, why in cut.items()}
    split = config.evaluate.split
    whose = "" if described(split) == described(HELD_OUT) else f" ({described(split)})"
    about |= {"reference": f"all pictures of the split {split}{whose}"}
    write_about(root, about)
    for name, _, values, _ in points(config) if config.cascade else ():
        cascade = _cascade(config, values)
        stages = {stage: _placed(config, stage, of, root / name) for stage, of in cascade.items()}
        text = OmegaConf.to_yaml({"stages": stages})
        write_atomically(root / name / CASCADE, lambda path, text=text: path.write_text(text))


def _cascade(config: DictConfig, values: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the stages of a point, with their sampling choices."""
    other = [config.instead[value] for value in values.values() if value in config.instead]
    return other[0] if other else config.cascade


def _placed(config: DictConfig, stage: str, of: Any, point: Path) -> dict[str, Any]:
    """Return a stage's sampling choices `of`, with its run's path if that is shared in `home`."""
    choices = {"run": stage, **(of or {})}
    if stage != config.train:
        choices["run"] = os.path.relpath(Path(config.home) / choices["run"], point)
    return choices


def _set(config: DictConfig, choice: str, point: Path) -> str:
    """Return a sampling choice; a run that it names is a shared one in `home`."""
    stage, option, value = parsed_choice(choice)
    if option != "run":
        return choice
    return f"{stage}.run={os.path.relpath(Path(config.home) / value, point)}"


def _measurement(
    config: DictConfig, point: Path, seed: int, values: Mapping[str, str], ready: bool
) -> Task:
    """Return the task that measures a point at all of its cells.

    Args:
        ready: whether all trainings that it samples from are done; if not, earlier measurements
            are out of date.
    """
    files = Point(point)
    folder = files.evaluation.absolute()
    asked = {
        "model": str(point.absolute()),
        "data": str(Path(config.data.path).absolute()),
        "judge": str(Path(config.judge).absolute()),
        "point": dict(values),
        "seed": seed,
        "choices": {
            axis: {value: [_set(config, one, point) for one in sets] for value, sets in of.items()}
            for axis, of in OmegaConf.to_container(config.choices).items()
        },
        "trained": config.train,
        **config.evaluate,
    }
    cascade = _cascade(config, values).items()
    text, runs = OmegaConf.to_yaml(asked), [_placed(config, s, of, point) for s, of in cascade]
    parts = [Run(point / run["run"]).status_file for run in runs]
    cells = math.prod(len(of) for of in asked["choices"].values())
    done = ready and _current(folder, text, parts, lambda: files.count >= cells)
    return Task(folder, ["measure", str(folder / FROZEN)], text, done)


def _current(
    folder: Path, config: str, parts: Iterable[Path], complete: Callable[[], bool]
) -> bool:
    """Return whether all cells were measured with this configuration, after all trainings."""
    mark, frozen = folder / DONE, folder / FROZEN
    if not finished(folder, there=complete):
        return False
    if not frozen.exists() or frozen.read_text() != config:
        return False
    # A training that ended later than the measurement has other weights than those measured.
    return all(p.exists() and p.stat().st_mtime < mark.stat().st_mtime for p in parts)
