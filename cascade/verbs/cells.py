"""`cascade cells`: a trained cascade, measured at every cell of a grid of sampling choices.

All cells of a sweep paint the same captions with the same noise, and are judged by the same CLIP
against the same reference. A cell is a line of cells.jsonl as soon as it is measured: what a kill
leaves undone is all that the same command does.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from cascade.data.lease import lease
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.weights import weights_hash
from cascade.eval.ablation import JUDGES_WEIGHTS
from cascade.eval.extraction import features_of_split
from cascade.eval.features import CLIPFeatures
from cascade.eval.protocol import HeldOut, picture_metrics, side
from cascade.files import check_writable, write_atomically
from cascade.grids import grid, to_uint8
from cascade.pipeline import Cascade
from cascade.stage import Stage
from cascade.texts import lines
from cascade.training.cost import Account
from cascade.verbs.configuration import loaded
from cascade.verbs.data import EMBEDDINGS
from cascade.verbs.evaluate import held_out_split
from cascade.verbs.nearest import nearest
from cascade.verbs.sample import device, load_cascade, paint
from cascade.verbs.unseen import check_unseen
from cascade.verbs.whole import CASCADE, stage_choices, stage_runs

CELLS, NEAREST = "cells.jsonl", "nearest.png"
SHOWN = 24  # pictures of a grid

Value = str | int | float  # of a sampling choice


@dataclass(frozen=True)
class Grid:
    """What is measured: one point of a sweep, at each cell of its sampling choices.

    Args:
        model: the folder of the point's cascade.yaml.
        data: shards with the held-out split.
        judge: the CLIP that judges, which neither conditions nor reranks.
        point: the trained point's values, by axis; `seed` is that of its training and its noise.
        choices: by axis, by value: what it sets, as "stage.option=value".
        trained: the stage that the point trained; None: none.
        count: captions of each kind.
    """

    model: str
    data: str
    judge: str
    point: Mapping[str, str]
    seed: int
    choices: Mapping[str, Mapping[Value, Sequence[str]]]
    trained: str | None
    split: str
    count: int


def main(args: argparse.Namespace) -> Sequence[Path]:
    measured = measure(Path(args.file)) / CELLS
    print(measured)
    return [measured]


def measure(file: Path) -> Path:
    """Measures what is left of the grid that a file describes; returns the point's folder.

    Raises:
        UserError: among others, another process measures this point.
    """
    asked = Grid(**OmegaConf.to_container(loaded(file)))
    folder = Path(asked.model)
    with lease(folder):
        _measure(asked, folder)
    return folder


def _measure(asked: Grid, folder: Path) -> None:
    judge = FrozenCLIP(asked.judge).to(device())
    common = {"judge": judge.hash, JUDGES_WEIGHTS: judge.former.hash, "split": asked.split}
    common |= {"captions of each kind": asked.count}
    hash_of = cache(lambda run: weights_hash(run.glob("*.safetensors")))  # many cells, few runs
    wanted = [
        (choices, sets, {**_painters(folder / CASCADE, sets, hash_of), **common})
        for choices, sets in cells(asked.choices)
    ]
    known = [(choices, protocol) for choices, _, protocol in wanted]
    there = [{**row, "protocol": _noted(row["protocol"], judge)} for row in rows(folder)]
    done = [row for row in there if (row["choices"], row["protocol"]) in known]
    left = [cell for cell in wanted if cell[0] not in [row["choices"] for row in done]]
    if left:
        check_writable(folder)
        cascade, data = load_cascade(folder), Path(asked.data)
        check_unseen(stage_runs(folder / CASCADE).values(), data, asked.split)
        captions = held_out_split(data, asked.split, asked.count, cascade, data / EMBEDDINGS)
        last = cascade.stages[-1].writes
        _save_grid(folder, "truth", captions.truth[last], captions)
        if asked.trained:
            runs = stage_runs(folder / CASCADE)
            stage = _stages(cascade.stages[list(runs).index(asked.trained)])[0]
            _write_cost(folder, stage, runs[asked.trained], captions)
        features = CLIPFeatures(judge)
        real = {last: features_of_split(data, asked.split, side(last), features)}
    for choices, sets, protocol in left:
        row, painted = _cell(folder, sets, captions, real, features, asked.seed)
        about = {"point": dict(asked.point), "seed": asked.seed, "choices": choices}
        done.append({**about, **row, "protocol": protocol})
        name = ",".join(f"{axis}={value}" for axis, value in choices.items()) or "painted"
        _save_grid(folder, name, painted, captions)
        if len(done) == 1:
            sheet = nearest(painted, captions.captions, data, features)
            write_atomically(folder / NEAREST, lambda path, sheet=sheet: sheet.save(path, "PNG"))
        text = "".join(json.dumps(row) + "\n" for row in done)
        write_atomically(folder / CELLS, lambda path, text=text: path.write_text(text))


def cells(
    choices: Mapping[str, Mapping[Value, Sequence[str]]],
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The values of each cell, by axis, and what they set."""
    for values in itertools.product(*(axis.items() for axis in choices.values())):
        names = dict(zip(choices, (name for name, _ in values)))
        yield names, [choice for _, own in values for choice in own]


def _noted(protocol: dict[str, Any], judge: FrozenCLIP) -> dict[str, Any]:
    """A cell's protocol; one that an earlier version noted, as this one notes it."""
    if JUDGES_WEIGHTS in protocol or differs(judge, protocol["judge"]):
        return protocol
    return {**protocol, "judge": judge.hash, JUDGES_WEIGHTS: judge.former.hash}


def _painters(file: Path, sets: Sequence[str], hash_of: Callable[[Path], str]) -> dict[str, Any]:
    """What paints a cell: each stage's sampling choices, and its weights."""
    stages = stage_choices(file, sets)
    runs = stage_runs(file, sets)
    for name, of in stages.items():
        if weaker := (of or {}).get("weaker"):
            runs[f"{name}.weaker"] = runs[name].parent / weaker
    weights = {name: hash_of(run) for name, run in runs.items()}
    return {"weights": weights, "stages": stages}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The cells of a point that are measured."""
    path = folder / CELLS
    return [json.loads(line) for line in lines(path.read_text())] if path.exists() else []


def _cell(
    folder: Path,
    sets: Sequence[str],
    data: HeldOut,
    real: Mapping[str, Tensor],
    features: CLIPFeatures,
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    """One cell's numbers, and what was painted."""
    cascade, begin = load_cascade(folder, sets), time.monotonic()
    calls = _count_calls(cascade)
    key = cascade.stages[-1].writes
    painted = paint(cascade, data.captions, seed, size=50, what=" ".join(sets) or folder.name)
    seconds = time.monotonic() - begin
    final = picture_metrics({key: painted[key]}, data, real, features, features.clip)[key]
    kinds = [final[kind] for kind in ("one", "two") if kind in final]
    row = {"count": len(data), **final, "evaluations": sum(calls.values()) / len(data)}
    row["evaluations_by_stage"] = {name: n / len(data) for name, n in calls.items()}
    if kinds:
        right = sum(kind["whole"] * kind["count"] for kind in kinds)
        row["accuracy"] = right / sum(kind["count"] for kind in kinds)
    return {**row, "seconds": round(seconds, 2)}, painted[key]


def _count_calls(cascade: Cascade) -> dict[str, int]:
    """Pictures that go through each stage's networks, both branches of guidance, as they paint."""
    calls: dict[str, int] = {}
    for link in cascade.stages:
        for stage in _stages(link):
            calls[link.writes] = 0

            def count(net: Any, args: tuple, key: str = link.writes) -> None:
                calls[key] += len(args[0])

            stage.net.register_forward_pre_hook(count)
    return calls


def _stages(link: Any) -> list[Stage]:
    """The stages that a link of a cascade samples."""
    if not isinstance(link, Stage):
        return _stages(link.stage)
    return [link] if link.weaker is None else [link, link.weaker]


def _save_grid(folder: Path, name: str, pictures: Tensor, data: HeldOut) -> None:
    chosen = range(0, len(data), max(1, len(data) // SHOWN))[:SHOWN]
    shown = to_uint8(pictures[list(chosen)])
    captions, scale = [data.captions[i] for i in chosen], max(1, 128 // shown.shape[1])
    sheet = grid(shown, columns=8, captions=captions, scale=scale)
    path = folder / "grids" / f"{name}.png"
    write_atomically(path, lambda beside: sheet.save(beside, "PNG"))


def _write_cost(folder: Path, stage: Stage, run: Path, data: HeldOut) -> None:
    """What the stage that a point trained holds, and what it took."""
    calls, account = _count_calls(Cascade([stage])), Account()
    given = {key: data.truth[key][:1].to(device()) for key in stage.reads & data.truth.keys()}
    with torch.no_grad(), account:
        stage.sample({**given, "caption": data.captions[:1], "sample": torch.arange(1)}, seed=0)
    with (run / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    texts = [getattr(encoder, "text_parameters", 0) for encoder in stage.encoders]
    cost = {
        "parameters": sum(p.numel() for p in stage.parameters()),
        "text_parameters": sum(texts),
        "flops": account.flops // sum(calls.values()),
        "images": int(last["images"]),
        "hours": float(last["seconds"]) / 3600,
        "device": _device_name(),
    }
    write_atomically(folder / "cost.json", lambda path: path.write_text(json.dumps(cost)))


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
