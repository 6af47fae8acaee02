"""Real trainings, minutes each: `make test-slow`."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from cascade.data.scenes import write_scenes
from cascade.verbs import train
from cascade.verbs.configuration import composed

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
    folder = train.run(composed("train", [*overrides, *more, "+data.cache=true", "grids=1"]))
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert sum(losses[-3:]) / 3 < 0.13


def test_a_run_killed_without_warning_equals_an_unkilled_one(shards, tmp_path):
    def start(run):
        argv = ["stage=sr256", "size=32", "low=8", "crop=null", "batch=4", "images=400", "grids=0"]
        argv += [f"data.path={shards}", f"run={tmp_path / run}", "save_seconds=1.0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "cascade", "train", *argv],
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    assert start("whole").wait() == 0
    killed = start("killed")
    while not list((tmp_path / "killed").glob("checkpoints/step-*")):
        time.sleep(0.05)
        assert killed.poll() is None
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    a, b = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)
