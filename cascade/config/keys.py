"""The types of a configuration's top-level values, which no target's signature declares.

There is one class for each file at the top of `conf/`, which holds the values. `signatures` reads
these annotations from the source, as it reads those of the targets; nothing imports them.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class CLIP:
    path: str
    checkpoint: str | None
    unit: bool
    model: Any


class Text:
    size: int


class Trainer:
    devices: int | str | Sequence[int]
    num_nodes: int


class Data:
    path: str


class Control:
    size: int
    extension: str


class Train:
    name: str
    run: str
    start: str | None
    seed: int
    batch: int
    images: int
    ema: float
    warmup: int
    workers: int
    fit_images: int
    grids: int
    grid_split: str
    save_seconds: float
    gradient_clip: float | None
    spike: float | None
    watchdog: float
    micro_batch: int | None
    size: int
    low: int
    crop: int | None
    classes: int
    embeddings: str
    control: Control
    clip: CLIP
    text: Text
    trainer: Trainer


class Distill:
    run: str
    teacher: str
    steps: int
    choices: "cascade.runs.choices.SamplingChoices | None"
    images: int
    batch: int | None
    micro_batch: int | None
    lr: float | None
    ema: float
    seed: int
    grids: int
    workers: int


class Personalize:
    model: str
    pictures: str
    token: str
    out: str
    noun: str | None
    word: str | None
    stages: Sequence[str] | None
    preserve: float
    kept: int
    prompts: str | None
    images: int
    warmup: int
    batch: int
    micro_batch: int | None
    ema: float
    seed: int
    grids: int
    workers: int


class Scenes:
    level: str
    size: int
    counts: Mapping[str, int]


class Evaluate:
    split: str
    count: int
    counts: Mapping[str, int]
    guidance: Sequence[float]


class Common:
    """Values that `demo`, `launch` and `sweep` share."""

    name: str
    run: str
    seed: int
    judge: str
    scenes: Scenes | None
    evaluate: Evaluate
    cascade: Mapping[str, "cascade.runs.choices.SamplingChoices | None"]
    precompute: int
    resources: Mapping[str, "cascade.slurm.batch.Slurm"]
    data: Data


class Demo(Common):
    caption: str
    stages: Mapping[str, Sequence[str]]
    budgets: Mapping[str, Sequence[str]]
    each: Sequence[str]


class Launch(Demo):
    """The same as of `demo`."""


class Sweep(Common):
    home: str
    question: str
    paper: str
    shared: Mapping[str, Sequence[str]]
    needs: Sequence[str]
    train: str | None
    base: Sequence[str]
    axes: Mapping[str, Mapping[str, Sequence[str]]]
    control: str | None
    instead: Mapping[str, Mapping[str, "cascade.runs.choices.SamplingChoices | None"]]
    seeds: Sequence[int]
    rungs: Sequence[float]
    rung_measure: str
    choices: Mapping[str, Mapping[str, Sequence[str]]]
    along: str | None
