"""`cascade sweep`: a question, answered by a grid.

    what points share -> the points, trained side by side -> each measured, cell by cell -> report

A point is one value of each of the `axes`, and a seed; a cell is a point sampled with one value of
each of the `choices`. A point's directory, named by its place in the grid, is its identity: the
same command again goes on with what is not finished. Trainings that points share lie beside the
sweep, in `home`, where other sweeps find them.
"""

import argparse
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cascade.data.splits import HELD_OUT, described
from cascade.done import DONE, STATUS, finished
from cascade.errors import UserError
from cascade.files import check_writable, write_atomically
from cascade.slurm.plan import FROZEN, Launcher, Link, Task, launch
from cascade.verbs.checks import check_split
from cascade.verbs.configuration import built, composed
from cascade.verbs.launch import trainings
from cascade.verbs.overrides import assigned
from cascade.verbs.sending import LAUNCHER, split, training
from cascade.verbs.whole import CASCADE, parsed_choice

# Of the sweep; every other override is one of each point's training.
_OWN = (
    *("sweep", LAUNCHER, "home", "run", "scenes", "shared", "needs", "base", "axes", "seeds"),
    *("train", "cascade", "choices", "evaluate", "judge", "precompute", "resources", "data.path"),
)


def main(args: argparse.Namespace) -> None:
    own, overrides = split(args.overrides, _OWN)
    config = composed("sweep", own)
    launcher, root = built(config.launcher), Path(config.run)
    check_writable(root, "choose another run=...")
    links = grid(config, overrides, launcher)
    describe(config, root)
    launch(launcher, root, links)


def grid(config: DictConfig, overrides: Sequence[str], launcher: Launcher) -> list[Link]:
    """The links of a sweep.

    Args:
        overrides: of every point's training, behind those of the sweep.

    Raises:
        UserError: the sweep needs what is not shared, a configuration is wrong, or the shards have
            no such split to measure with.
    """
    root, home, data = Path(config.run), Path(config.home), Path(config.data.path)
    if unknown := [name for name in config.needs if name not in config.shared]:
        raise UserError(f"needs {unknown[0]}, which `shared` does not say how to train")
    if config.axes and not config.train:
        raise UserError("axes without train: say which stage the points train, as train=decoder")
    if config.cascade and not config.scenes:
        check_split(data, config.evaluate.split)
    asked = {
        name: [*config.shared[name], assigned("run", home / name), assigned("data.path", data)]
        for name in config.needs
    }
    links = trainings(config, home, asked, launcher)
    before, shared = [link.name for link in links], [t for link in links for t in link.tasks]
    tasks, measured = [], []
    for name, seed, values, own in points(config):
        if config.train:
            at = [assigned("run", root / name / config.train), assigned("data.path", data)]
            at.append(assigned("seed", seed))
            tasks.append(training(joined(config.base, overrides, own, at), launcher)[0])
        if config.cascade:
            ready = all(task.done for task in [*shared, *tasks[-1:]])
            measured.append(_measured(config, root / name, seed, values, ready))
    resources = OmegaConf.to_container(config.resources)
    if tasks:
        links.append(Link("sweep", tasks, before, resources=resources.get("sweep", {})))
    if measured:
        own, each = resources.get("evaluation", {}), "sweep" if tasks else None
        links.append(Link("evaluation", measured, before, True, own, each_after=each))
        report = Task((root / "report").absolute(), ["report", str(root)])
        links.append(Link("report", [report], ["evaluation"], alone=True, resources=own))
    return links


def points(config: DictConfig) -> Iterator[tuple[str, int, dict[str, str], list[str]]]:
    """Name, seed, values and overrides of each point, all of the first seed first."""
    axes = OmegaConf.to_container(config.axes)
    for seed in config.seeds:
        for values in itertools.product(*(axis.items() for axis in axes.values())):
            names = [str(name) for name, _ in values]
            own = [override for _, overrides in values for override in overrides]
            yield "-".join([*names, f"s{seed}"]), seed, dict(zip(axes, names)), own


def joined(*parts: Sequence[str]) -> list[str]:
    """Overrides one behind the other; the last of several for one key is the one that counts."""
    return list({o.partition("=")[0].lstrip("+"): o for part in parts for o in part}.values())


def describe(config: DictConfig, root: Path) -> None:
    """Writes sweep.json and each point's cascade.yaml, which the report and `sample` read."""
    grids = {part: OmegaConf.to_container(config[part]) for part in ("axes", "choices")}
    about = {key: config[key] for key in ("name", "question", "paper", "along", "control")}
    about |= {part: {axis: list(of) for axis, of in grid.items()} for part, grid in grids.items()}
    about |= {part: OmegaConf.to_container(config[part]) for part in ("at", "expected")}
    about |= {"seeds": list(config.seeds), "features": "picture embeddings of the CLIP that judges"}
    split = config.evaluate.split
    whose = "" if described(split) == described(HELD_OUT) else f" ({described(split)})"
    about |= {"reference": f"all pictures of the split {split}{whose}"}
    text = json.dumps(about, indent=1) + "\n"
    write_atomically(root / "sweep.json", lambda path: path.write_text(text))
    for name, *_ in points(config) if config.cascade else ():
        stages = {stage: _placed(config, stage, root / name) for stage in config.cascade}
        text = OmegaConf.to_yaml({"stages": stages})
        write_atomically(root / name / CASCADE, lambda path, text=text: path.write_text(text))


def _placed(config: DictConfig, stage: str, point: Path) -> dict[str, Any]:
    """The sampling choices of a stage; what is shared is looked for in `home`."""
    choices = {"run": stage, **(config.cascade[stage] or {})}
    if stage != config.train:
        choices["run"] = os.path.relpath(Path(config.home) / choices["run"], point)
    return choices


def _set(config: DictConfig, choice: str, point: Path) -> str:
    """A sampling choice; the other run that one may name is a shared one."""
    stage, option, value = parsed_choice(choice)
    if option != "run":
        return choice
    return f"{stage}.run={os.path.relpath(Path(config.home) / value, point)}"


def _measured(
    config: DictConfig, point: Path, seed: int, values: Mapping[str, str], ready: bool
) -> Task:
    """The evaluation of a point, at each of its cells; what is measured already is passed over.

    Args:
        ready: whether all that it is of is trained: what is measured before that is out of date.
    """
    folder = point.absolute() / "evaluation"
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
    text, runs = OmegaConf.to_yaml(asked), [_placed(config, s, point) for s in config.cascade]
    parts = [point / run["run"] / STATUS for run in runs]
    cells = math.prod(len(of) for of in asked["choices"].values())
    done = ready and _current(folder, text, parts, point / "cells.jsonl", cells)
    return Task(folder, ["cells", str(folder / FROZEN)], text, done)


def _current(folder: Path, config: str, parts: Iterable[Path], measured: Path, cells: int) -> bool:
    """Whether so many cells were measured with this configuration, behind all that they are of."""
    mark, frozen = folder / DONE, folder / FROZEN

    def there() -> bool:
        return measured.exists() and len(measured.read_text().split("\n")) > cells

    if not finished(folder, there=there):
        return False
    if not frozen.exists() or frozen.read_text() != config:
        return False
    return all(p.exists() and p.stat().st_mtime < mark.stat().st_mtime for p in parts)
