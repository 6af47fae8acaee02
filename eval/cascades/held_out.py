"""The held-out samples that a cascade is measured on, and that they were not trained on."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from cascade.batch import image_size
from cascade.data.embeddings import EMBEDDINGS, Embeddings
from cascade.data.loading import collate, put_rows
from cascade.data.scenes.generate import Scene
from cascade.data.shards import Shards
from cascade.data.tars.dataset import read_dataset
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.eval.cascades.protocol import KINDS, HeldOut
from cascade.pipeline import Cascade
from cascade.runs.run import Run
from cascade.training.provenance import trained_on


def check_unseen(runs: Iterable[Path], data: Path, split: str) -> None:
    """Raises UserError if a run was trained on samples that the index of `data` now holds out."""
    dataset = read_dataset(data)
    if not (dataset and dataset.held_out):
        return
    shards = partial(Shards, data, Pictures(()), max_skip_fraction=1.0)
    share = shards(split=split).corpus.share
    for run in runs:
        asked = Run(run).config.data
        own = {key: asked[key] for key in ("split", "captions") if key in asked}
        if trained_on(run, partial(shards, **own), share):
            raise UserError(
                f"{run} was trained on samples that {data} now holds out: train it again, or "
                "measure with --split all, which the report mentions"
            )


def held_out_split(data: Path, split: str, count: int, cascade: Cascade) -> HeldOut:
    """The first `count` samples of each kind of caption; without scenes, the first `count`.

    They have precomputed CLIP embeddings if there are any next to the shards.
    """
    sizes = [size for stage in cascade.stages if (size := image_size(stage.writes))]
    stores = {"clip": Embeddings(data / EMBEDDINGS)} if (data / EMBEDDINGS).is_dir() else None

    def shards(sizes: Sequence[int]) -> Shards:
        pictures = Pictures(tuple(sizes))
        fields = ("scene", "concept", "style")
        return Shards(data, pictures, split, shuffle=False, embeddings=stores, json_fields=fields)

    # Choose samples before decoding pictures: those of the whole split would not fit in memory.
    bare = shards([])
    light = collate([bare[i] for i in range(len(bare))])
    rows = list(range(min(count, len(light["caption"]))))
    if all(light["scene"]):
        found = [Scene.from_json(scene) for scene in light["scene"]]
        kinds = [[i for i, s in enumerate(found) if s.kind == kind] for kind in KINDS]
        rows = sorted(i for kind in kinds for i in kind[:count])
    whole = shards(sizes)
    truth: dict[str, torch.Tensor] = {}
    captions, scenes, shown = [], [], []
    for start in range(0, len(rows), 64):
        part = collate([whole[i] for i in rows[start : start + 64]])
        # What they show is taken from here: a broken picture is replaced by another sample.
        captions += part["caption"]
        scenes += part["scene"]
        shown += zip(part["concept"], part["style"])
        tensors = {k: v for k, v in part.items() if isinstance(v, torch.Tensor) and k != "sample"}
        put_rows(truth, tensors, start, len(rows))
    named = all(isinstance(text, str) for pair in shown for text in pair)
    drawn = [Scene.from_json(s) for s in scenes] if all(scenes) else None
    return HeldOut(captions, truth, drawn, shown if named else None)
