"""`cascade launch`: a whole cascade as a chain of jobs, each link behind those that it needs.

    scenes -> CLIP -> embeddings -> prior, decoder, super-resolution -> evaluation

Each link has its directory in the cascade's. What is finished is passed over, so that the same
command again, behind a failure, does only what is missing.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cascade.data.tar import tars_of
from cascade.done import DONE, finished
from cascade.files import check_writable
from cascade.slurm.plan import Launcher, Link, Task, launch
from cascade.verbs import whole
from cascade.verbs.checks import check_split
from cascade.verbs.configuration import built, composed
from cascade.verbs.sending import training

_SCENES = 1000  # of a shard, as `write_scenes` has it


def main(args: argparse.Namespace) -> None:
    config = composed("launch", args.overrides)
    launcher, root = built(config.launcher), Path(config.run)
    check_writable(root, "choose another run=...")
    links = chain(config, launcher)
    whole.write_cascade(config, root)
    launch(launcher, root, links)


def chain(config: DictConfig, launcher: Launcher) -> list[Link]:
    """The links of a cascade, in an order in which each stands behind those that it needs.

    Raises:
        UserError: the configuration of a stage is wrong, its directory is another's, or the shards
            have no split to measure with.
    """
    root, data = Path(config.run), Path(config.data.path)
    if not config.scenes:
        check_split(data, next(iter(config.evaluate.counts)))
    asked = {name: whole.overrides(config, name, root, data) for name in config.stages}
    links = trainings(config, root, asked, launcher)
    ended = all(task.done for link in links for task in link.tasks)
    tasks, after = [_evaluation(config, root, data, ended)], [link.name for link in links]
    resources = OmegaConf.to_container(config.resources).get("evaluation", {})
    return [*links, Link("evaluation", tasks, after, alone=True, resources=resources)]


def trainings(
    config: DictConfig, root: Path, asked: Mapping[str, Sequence[str]], launcher: Launcher
) -> list[Link]:
    """Trainings by name, behind the scenes, CLIPs and embeddings that they need.

    Args:
        config: says `data`, `scenes`, `seed`, `precompute` and `resources`.
        root: has the directories of scenes and embeddings.
        asked: each training's overrides.
    """
    data, resources = Path(config.data.path), OmegaConf.to_container(config.resources)
    links: dict[str, Link] = {}

    def add(name: str, tasks: Sequence[Task], after: Sequence[str], alone: bool = True) -> None:
        before = [one for one in after if one in links]
        links[name] = Link(name, tasks, before, alone, resources.get(name, {}))

    sent = {name: training(own, launcher, resources.get(name)) for name, own in asked.items()}
    # A CLIP generates nothing; what generates may need what it says of the pictures.
    clips = [name for name, (_, own) in sent.items() if "codec" not in own.stage]
    # By store, one of the trainings that are joined with it.
    stores = {name: own for _, own in sent.values() for name in own.data.get("embeddings") or {}}
    if config.scenes:
        add("scenes", [_scenes(config, root, data)], [])
    for name in clips:
        add(name, [sent[name][0]], ["scenes"], alone=False)
    if stores:
        tasks = [_precompute(stores, root, data, i) for i in range(config.precompute)]
        add("precompute", tasks, ["scenes", *map(_clip, stores.values())])
    for name in [name for name in sent if name not in clips]:
        task, own = sent[name]
        add(name, [task], ["scenes", _clip(own), "precompute"], alone=False)
    return list(links.values())


def _clip(config: DictConfig) -> str:
    """The name of the CLIP that a training reads with, if it is trained beside it."""
    return Path(config.clip.path).name


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
    """One of the jobs that share the work among themselves."""
    folder = root / "precompute" / str(number)
    folders = [own.data.embeddings[name].folder for name, own in stores.items()]
    done = finished(folder, there=lambda: all(_embedded(data, Path(of)) for of in folders))
    command = ["data", "precompute", data]
    if own := stores.get("clip"):
        command += ["--clip", own.clip.path, "--out", own.data.embeddings.clip.folder]
        command += _named(own.clip)
        status = Path(own.clip.path) / "status.json"
        if done and status.exists():  # of the CLIP as it is now
            done = status.stat().st_mtime < (folder / DONE).stat().st_mtime
    if own := stores.get("text"):
        reader = own.text.reader
        command += ["--text", reader.path_or_name, "--text-out", own.data.embeddings.text.folder]
        command += [] if "--checkpoint" in command else _named(reader)
        command += ["--length", reader.length] if "length" in reader else []
        command += ["--captions", ",".join(own.data.captions)] if "captions" in own.data else []
        command += ["--several", own.data.several] if own.data.get("several") else []
    return _task(folder, command, done)


def _named(clip: DictConfig) -> list[str]:
    """Options that go with a CLIP by name."""
    quick = clip.get("quick_gelu")
    words = ["--checkpoint", clip.checkpoint] if clip.get("checkpoint") else []
    return [*words, *([] if quick is None else ["--quick-gelu", str(quick).lower()])]


def _embedded(data: Path, folder: Path) -> bool:
    """Whether every shard has its rows."""
    tars = {path.stem for path in tars_of(data)}
    return bool(tars) and tars <= {path.stem for path in folder.glob("*.safetensors")}


def _evaluation(config: DictConfig, root: Path, data: Path, ended: bool) -> Task:
    split, count = next(iter(config.evaluate.counts.items()))
    command = ["evaluate", "--model", root, "--data", data, "--judge", config.judge]
    command += ["--split", split, "--count", count, "--seed", config.seed]
    command += ["--guidance", ",".join(map(str, config.evaluate.guidance))]
    return _task(root / "evaluation", command, ended and whole.measured(root))
