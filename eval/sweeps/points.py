"""Measurement of one point of a sweep at every cell of a grid of sampling choices.

All cells of a sweep use the same captions and noise, and are judged by the same CLIP against the
same reference. Every cell is written as soon as it is measured, so after an interruption the same
command measures only the missing cells.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from cascade.batch import Batch, image_size
from cascade.config.compose import loaded
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.weights import weights_hash
from cascade.eval.cascades.concepts import concepts_of
from cascade.eval.cascades.held_out import check_unseen, held_out_split
from cascade.eval.cascades.nearest import nearest
from cascade.eval.cascades.protocol import PHRASINGS, HeldOut, looking, picture_metrics
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.metrics.measures import ACCURACY, HELD_OUT_PHRASINGS, IN_STYLE, RETRIEVED
from cascade.eval.pictures.extraction import features_of_split
from cascade.eval.sweeps.folder import SEED, Point, write_picture
from cascade.eval.sweeps.results import JUDGES_WEIGHTS
from cascade.files.atomic import check_writable
from cascade.files.lease import lease
from cascade.grids import grid, to_uint8
from cascade.nets.cost import Account
from cascade.pipeline import Cascade, Link
from cascade.runs.cascade_file import CASCADE, companions, stage_choices, stage_runs
from cascade.runs.model import device, load_cascade, paint
from cascade.runs.run import Run
from cascade.stage import Stage

SHOWN = 24  # pictures in a grid


@dataclass(frozen=True)
class Grid:
    """A point of a sweep, and the grid of sampling choices to measure it at.

    Args:
        model: the point's folder, with its cascade.yaml.
        data: shards with the held-out split.
        judge: directory of the CLIP that judges, which neither conditions nor reranks.
        point: the point's values, by axis.
        seed: the seed of the point's training and of all sampling noise.
        choices: by axis and value, the sampling choices to set, as "stage.option=value".
        trained: the stage that the point trained; None: none.
        count: captions of each kind.
    """

    model: str
    data: str
    judge: str
    point: Mapping[str, str]
    seed: int
    choices: Mapping[str, Mapping[str | int | float, Sequence[str]]]
    trained: str | None
    split: str
    count: int


def measure_point(file: Path) -> Point:
    """Measure the missing cells of the grid that a file describes (the fields of `Grid`).

    Raises:
        UserError: the file or what it names is unusable, or another process measures this point.
    """
    asked = Grid(**OmegaConf.to_container(loaded(file)))
    point = Point(Path(asked.model))
    with lease(point.folder):
        _measure(asked, point)
    return point


def _measure(asked: Grid, point: Point) -> None:
    folder = point.folder
    judge = FrozenCLIP(asked.judge).to(device())
    common = {"judge": judge.hash, JUDGES_WEIGHTS: judge.former.hash, "split": asked.split}
    common |= {"captions of each kind": asked.count}
    hash_of = cache(lambda run: weights_hash(Run(run).weights))  # many cells share few runs
    wanted = [
        (choices, sets, {**_sampled_by(folder / CASCADE, sets, hash_of), **common})
        for choices, sets in cells(asked.choices)
    ]
    known = [(choices, protocol) for choices, _, protocol in wanted]
    rows = point.cells()
    rows = [{**row, "protocol": _current_protocol(row["protocol"], judge)} for row in rows]
    done = [row for row in rows if (row["choices"], row["protocol"]) in known]
    left = [cell for cell in wanted if cell[0] not in [row["choices"] for row in done]]
    if left:
        check_writable(folder)
        load = cache(Run.load)
        cascade, data = load_cascade(folder, load=load), Path(asked.data)
        check_unseen(stage_runs(folder / CASCADE).values(), data, asked.split)
        captions = held_out_split(data, asked.split, asked.count, cascade)
        last = cascade.stages[-1].writes
        write_picture(point.truth, _sheet(captions.truth[last], captions))
        if asked.trained:
            runs = stage_runs(folder / CASCADE)
            stage = _stages(cascade.stages[list(runs).index(asked.trained)])[0]
            point.write_cost(_cost(stage, Run(runs[asked.trained]), captions))
        features = CLIPFeatures(judge)
        real = {last: features_of_split(data, asked.split, image_size(last), features)}
        look = looking(captions, features)
        known = captions.shown and concepts_of(data, asked.split, features, image_size(last), 0)
    kept: dict[str, Sampled] = {}
    for i, (choices, sets, protocol) in enumerate(left):
        named = list(zip(_prefixes(protocol), load_cascade(folder, sets, load).stages))
        sampled = _sample(named, captions, asked.seed, kept, " ".join(sets) or folder.name)
        later = {prefix for cell in left[i + 1 :] for prefix in _prefixes(cell[2])}
        kept = {prefix: kept[prefix] for prefix in kept.keys() & later}
        painted = sampled[-1].rows
        about = {"point": dict(asked.point), SEED: asked.seed, "choices": choices}
        looks = look({last: painted})
        row = _row(sampled, picture_metrics(looks, captions, real, features)[last])
        if known:
            seen = known.measured(looks[last].rows, captions.shown)
            row |= {RETRIEVED.key: seen["retrieval"], IN_STYLE.key: seen["style"], "concepts": seen}
        done.append({**about, **row, "protocol": protocol})
        write_picture(point.grid(choices), _sheet(painted, captions))
        if len(done) == 1:
            write_picture(point.nearest, nearest(painted, captions.captions, data, features))
        point.write_cells(done)


def cells(
    choices: Mapping[str, Mapping[str | int | float, Sequence[str]]],
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the values of each cell, by axis, and the sampling choices that they set."""
    for values in itertools.product(*(axis.items() for axis in choices.values())):
        names = dict(zip(choices, (name for name, _ in values)))
        yield names, [choice for _, own in values for choice in own]


def _current_protocol(protocol: dict[str, Any], judge: FrozenCLIP) -> dict[str, Any]:
    """Return a cell's protocol, converted if an earlier version named the judge by its weights."""
    if JUDGES_WEIGHTS in protocol or differs(judge, protocol["judge"]):
        return protocol
    return {**protocol, "judge": judge.hash, JUDGES_WEIGHTS: judge.former.hash}


def _sampled_by(file: Path, sets: Sequence[str], hash_of: Callable[[Path], str]) -> dict[str, Any]:
    """Return what determines a cell's samples: every stage's sampling choices and weights."""
    stages = stage_choices(file, sets)
    runs = stage_runs(file, sets) | companions(file, sets)
    weights = {name: hash_of(run) for name, run in runs.items()}
    return {"weights": weights, "stages": stages}


def _prefixes(protocol: Mapping[str, Any]) -> list[str]:
    """Return, for each stage, what determines its samples: itself and the stages before it."""
    stages, weights, prefix, found = protocol["stages"], protocol["weights"], [], []
    for name, choices in stages.items():
        further = [of for one, of in weights.items() if one.startswith(f"{name}.")]
        prefix.append([choices, weights[name], *further])
        found.append(json.dumps(prefix))
    return found


@dataclass(frozen=True)
class Sampled:
    """What a stage sampled for all captions.

    Attributes:
        key: that it writes.
        rows: its samples.
        calls: pictures that its networks evaluated.
        seconds: that it took.
    """

    key: str
    rows: Tensor
    calls: int
    seconds: float


def _sample(
    stages: Sequence[tuple[str, Link]],
    data: HeldOut,
    seed: int,
    kept: dict[str, Sampled],
    what: str,
) -> list[Sampled]:
    """Sample one stage after another, and reuse the samples of stages that are in `kept`.

    Args:
        stages: each with what determines its samples (`_prefixes`).
        kept: samples of earlier cells, by what determines them; receives the new ones.
        what: title of the progress bars.
    """
    given: Batch = {}
    for prefix, link in stages:
        if prefix not in kept:
            with counted(link) as calls:
                begin = time.monotonic()
                rows = paint(Cascade([link]), data.captions, seed, size=50, given=given, what=what)[
                    link.writes
                ]
                seconds = time.monotonic() - begin
            kept[prefix] = Sampled(link.writes, rows, sum(calls), seconds)
        given[link.writes] = kept[prefix].rows
    return [kept[prefix] for prefix, _ in stages]


def _row(sampled: Sequence[Sampled], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's numbers, given the measures of its pictures."""
    count = len(sampled[-1].rows)
    kinds = [measured[kind] for kind in ("one", "two") if kind in measured]
    row = {"count": count, **measured, "evaluations": sum(one.calls for one in sampled) / count}
    row["evaluations_by_stage"] = {one.key: one.calls / count for one in sampled}
    if kinds:
        right = sum(kind["whole"] * kind["count"] for kind in kinds)
        row[ACCURACY.key] = right / sum(kind["count"] for kind in kinds)
    if novel := measured.get(PHRASINGS[1]):
        row[HELD_OUT_PHRASINGS.key] = novel["whole"]
    return {**row, "seconds": round(sum(one.seconds for one in sampled), 2)}


@contextmanager
def counted(link: Link) -> Iterator[list[int]]:
    """Count the pictures of each call of a link's networks.

    Both branches of guidance count, and so does the weaker network of autoguidance.
    """
    calls: list[int] = []
    with ExitStack() as hooks:
        for stage in _stages(link):
            hook = stage.net.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
            hooks.callback(hook.remove)
        yield calls


def _stages(link: Any) -> list[Stage]:
    """Return the stages that a link of a cascade samples, the weaker one included."""
    if not isinstance(link, Stage):
        return _stages(link.stage)
    return [link] if link.weaker is None else [link, link.weaker]


def _sheet(pictures: Tensor, data: HeldOut) -> Image.Image:
    """Return a labelled grid of `SHOWN` pictures, evenly spaced over the captions."""
    chosen = range(0, len(data), max(1, len(data) // SHOWN))[:SHOWN]
    shown = to_uint8(pictures[list(chosen)])
    captions, scale = [data.captions[i] for i in chosen], max(1, 128 // shown.shape[1])
    return grid(shown, columns=8, captions=captions, scale=scale)


def _cost(stage: Stage, run: Run, data: HeldOut) -> dict[str, Any]:
    """Return the size of a trained stage, and what its training took."""
    account = Account()
    given = {key: data.truth[key][:1].to(device()) for key in stage.reads & data.truth.keys()}
    with torch.no_grad(), account, counted(stage) as calls:
        stage.sample({**given, "caption": data.captions[:1], "sample": torch.arange(1)}, seed=0)
    last = run.metrics()[-1]
    texts = [getattr(encoder, "text_parameters", 0) for encoder in stage.encoders]
    return {
        "parameters": sum(p.numel() for p in stage.parameters()),
        "text_parameters": sum(texts),
        "flops": account.flops // sum(calls),
        "images": int(last["images"]),
        "hours": float(last["seconds"]) / 3600,
        "device": _device_name(),
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
