"""`cascade personalize`: teach a model a thing of one's own from a few pictures."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cascade.batch import image_key, image_size
from cascade.config.compose import built, composed, differences, loaded, saved
from cascade.config.overrides import assigned
from cascade.data.embeddings import EMBEDDINGS
from cascade.data.tars.listing import Row, captioned_by_files, usable
from cascade.data.tars.pack import made, pack
from cascade.errors import UserError
from cascade.eval.pictures.generation import Job, generate
from cascade.eval.pictures.identity import identity
from cascade.eval.pictures.prompts import LAYOUTS, Prompt, read_prompts
from cascade.files.atomic import check_apart, check_writable, write_text
from cascade.formats.tables import as_one
from cascade.runs.cascade_file import CASCADE
from cascade.runs.model import load_cascade
from cascade.runs.progress import shown
from cascade.runs.run import Run
from cascade.training.fit import train
from cascade.training.personalize import WORD, Personal, cascade_file, personal
from cascade.verbs.data import embed

CONFIG = "personalize.yaml"  # in the new model: what it was made from
_OPTIONS = ("model", "pictures", "token", "out", "noun", "word", "stages", "preserve", "prompts")


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Train the stages, and write a model that samples with them; return what was written."""
    given = {name: vars(args)[name] for name in _OPTIONS if vars(args)[name] is not None}
    if args.method == WORD:
        given.setdefault("word", args.noun)
        if not given["word"]:
            raise UserError(
                "a learned word begins with the meaning of another: give --word or --class"
            )
    options = [assigned(name, value) for name, value in {"method": args.method, **given}.items()]
    config = composed("personalize", [*options, *args.overrides])
    task = personal(config)
    built(config.adapter or {})  # or it is refused before anything is written
    rows, texts = _pictures(task), _captions(config)
    _begin(config, task.out)
    own = _packed(rows, task.out / "pictures", task)
    kept = _class(task, texts) if config.preserve else {}
    runs = [Run(train(task.training(name, own, kept.get(name)))) for name in task.stages]
    write_text(task.out / CASCADE, OmegaConf.to_yaml(OmegaConf.create(task.stages_of())))
    print(f"{task.out} is a model: captions say {config.token!r}, such as {task.caption!r}")
    return [file for run in runs for file in (run.status_file, *run.weights)]


def _pictures(task: Personal) -> list[Row]:
    """List the usable pictures of the thing. UserError if there are none, or one is not named."""
    folder, token = Path(task.config.pictures), task.config.token
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of the pictures")
    named = ((name, of or {"caption": task.caption}) for name, of in captioned_by_files(folder))
    rows, refused = usable(folder, named)
    rows = [row._replace(captions={"caption": as_one(row.captions["caption"])}) for row in rows]
    for row in list(rows):
        found = made(row)
        if not isinstance(found, str) and 4 * min(found.size) < task.side:
            found = f"smaller than {task.side // 4} px"
        if isinstance(found, str):
            rows.remove(row)
            refused.setdefault(found, []).append(row.name)
    for reason, names in refused.items():
        print(f"{folder}: {len(names)} left out, such as {names[0]}: {reason}")
    if not rows:
        raise UserError(f"{folder} holds no picture that can be used: give one or more")
    for row in rows:
        if token.lower() not in row.captions["caption"].lower():
            raise UserError(f"{folder / row.name} has a caption that does not say {token}: add it")
    return rows


def _begin(config: DictConfig, out: Path) -> None:
    """Write down what is to be made, in a new folder or in one where it was begun before.

    Raises:
        UserError: the folder holds something else.
    """
    check_apart(out, Path(config.pictures), "choose another --out")
    check_writable(out, "choose another --out")
    if (file := out / CONFIG).exists():
        if changed := differences(*map(OmegaConf.to_container, (loaded(file), config))):
            raise UserError(
                f"{out} was begun with other choices ({changed[0]}): choose another --out, or "
                "remove it"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something else: choose another --out")
    saved(config, file)


def _packed(rows: Sequence[Row], out: Path, task: Personal) -> Path:
    """Write pictures as shards, with embeddings if a stage reads them; return the folder."""
    pack(rows, out, val=0, short=None, per_shard=1000, seed=task.config.seed)
    if clip := task.clip:
        named = {"checkpoint": clip.checkpoint, "quick_gelu": clip.quick_gelu, "unit": clip.unit}
        embed(out, clip.name, out / EMBEDDINGS, named)
    return out


def _captions(config: DictConfig) -> list[str]:
    """The captions of the class."""
    if config.prompts:
        return [prompt.text for prompt in read_prompts(Path(config.prompts))]
    return [f"a {config.noun}"]


def _class(task: Personal, texts: Sequence[str]) -> dict[str, Path]:
    """Paint pictures of the class with the base, and pack them; return the shards of each stage.

    A stage is to keep what itself painted, so those whose pictures are smaller than the largest
    have shards of their own: the same samples, with the embeddings of the largest pictures.
    """
    config, folder = task.config, task.out / "class"
    cascade = load_cascade(cascade_file(config.model))
    needed = max(task.side, task.clip.image_size if task.clip else 0)
    sizes = [size for link in cascade.stages if (size := image_size(link.writes))]
    largest = min((size for size in sizes if size >= needed), default=max(sizes))
    whole = _packed(_painted(task, texts, largest), folder / "shards", task)
    shards = {largest: whole}
    for side in {task.side_of(name) for name in task.stages} & {*sizes} - {largest}:
        shards[side] = folder / f"shards_{side}"
        pack(_painted(task, texts, side), shards[side], 0, None, 1000, config.seed)
    return {name: shards.get(task.side_of(name), whole) for name in task.stages}


def _painted(task: Personal, texts: Sequence[str], side: int) -> list[Row]:
    """Paint pictures of the class up to the stage of this side; those of a caption are equal."""
    config = task.config
    prompts, each = [Prompt(text) for text in texts], -(-config.kept // len(texts))
    out = task.out / "class" / f"painted_{side}"
    job = Job(out, prompts, LAYOUTS["plain"], each, config.seed)
    cascade = load_cascade(cascade_file(config.model)).upto(image_key(side))
    with shown("class", f"pictures of {side} px") as progress:
        generate(cascade, job, identity(cascade, job.out), progress=partial(progress))
    files = [(job.out / f"{item.id}.png", texts[item.prompt]) for item in job.items]
    return [Row(path.name, path, path.stat().st_size, {"caption": text}) for path, text in files]
