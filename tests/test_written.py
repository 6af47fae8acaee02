"""A run that an earlier version wrote is read, sampled and resumed, with the same numbers.

`written/` was made with commit eaca0ce and one thread (OMP_NUM_THREADS=1), in an empty folder:

    cascade data scenes shards --level plain --train 8 --val 0 --unseen 0 --size 16 --seed 0
    cascade train OPTIONS images=12     # `run`, without its tensorboard/ and heartbeats/
    cascade train OPTIONS images=24     # `resumed.safetensors` is weights.safetensors of this

`sampled.safetensors` is what the stage of `run` sampled for `batch`, below, with seed 0.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.cli import main
from cascade.runs.run import Run

WRITTEN = Path(__file__).parent / "written"
OPTIONS = ["stage=sr256", "data.path=shards", "run=run", "size=16", "low=8", "crop=null"]
OPTIONS += ["batch=4", "warmup=8", "grids=0", "ema=0.9", "trainer.devices=1"]
OPTIONS += ["net.net.channels=4", "net.net.multipliers=[1]", "net.net.blocks=1"]
OPTIONS += ["net.net.patch=2", "net.net.embed=8"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Run(Path("run"))


def batch():
    generator = torch.Generator().manual_seed(0)
    return {"image_8": torch.randn(2, 3, 8, 8, generator=generator), "sample": torch.arange(2)}


def test_a_run_that_an_earlier_version_wrote_is_read_and_sampled(run):
    assert run.config.images == 12
    assert run.status() == {"images": 12, "total": 12}
    assert [row["images"] for row in run.metrics()] == ["12"]
    assert [path.name for path in run.weights] == ["weights.safetensors"]
    assert [(step, path.name) for step, path in run.checkpoints()] == [(3, "step-00000003")]
    picture = load_file(WRITTEN / "sampled.safetensors")["picture"]
    torch.testing.assert_close(run.load().sample(batch(), seed=0), picture, atol=1e-5, rtol=0)


def test_a_run_that_an_earlier_version_wrote_is_resumed(run):
    assert main(["train", *OPTIONS, "images=24"]) == 0
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [(one["step"], one["consumed"]) for one in events if one["event"] == "resumed"] == [
        (3, 12)
    ]
    expected, found = load_file(WRITTEN / "resumed.safetensors"), load_file(run.weights[0])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=key)
