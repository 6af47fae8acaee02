"""Real trainings, minutes each: `make test-slow`."""

import csv

import pytest

from cascade.config.compose import composed
from cascade.data.scenes.generate import write_scenes
from cascade.training import fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 2000), ("val", 16)):
        write_scenes(folder, "plain", split, count, 64, seed=0)
    return folder


def test_a_text_decoder_learns_the_plain_scenes(shards, tmp_path):
    """The loss of a constant answer is above 0.5; 0.13 needs objects, colours and places."""
    overrides = ["stage=decoder_text", "size=16", "batch=32", "images=8_000", "warmup=500"]
    more = [f"data.path={shards}", f"run={tmp_path / 'run'}", "optim.lr=2e-3", "ema=0.99"]
    folder = fit.train(composed("train", [*overrides, *more, "+data.cache=true", "grids=1"]))
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert sum(losses[-3:]) / 3 < 0.13
