"""What `cascade sweep --dry-run` says: what is left, and hours by speeds that are known."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from cascade.cli import main
from cascade.config.compose import composed
from cascade.eval.sweeps import estimate
from cascade.eval.sweeps.estimate import Speed, estimated, show
from cascade.runs.run import Run
from cascade.slurm.local import Local
from cascade.slurm.plan import Task, TaskGroup
from cascade.training.callbacks.history import History
from tests.small import DECODER

HERE = Local(at_once=1, gpus=0, python=None)


class Cluster(Local):
    def ranks(self, resources):
        return {"devices": resources.get("gpus", 1), "num_nodes": 2}


def training(folder, channels, images=1000, seen=0, seconds=None):
    run = Run(folder / "decoder")
    run.path.mkdir(parents=True)
    given = [f"run={run.path}", f"images={images}", f"net.channels={channels}", "data.path=none"]
    config = composed("train", [*DECODER, *given])
    if seen:
        run.write_status(seen, images)
    if seconds:
        with run.metrics_file.open("w", newline="") as file:
            table = csv.DictWriter(file, History.COLUMNS)
            table.writeheader()
            table.writerow({"images": seen, "seconds": seconds})
    return Task(run.path, ["train"], OmegaConf.to_yaml(config, resolve=True), done=seen == images)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One done, one begun of the same kind, and a wider one."""
    root = tmp_path_factory.mktemp("sweep")
    return [
        training(root / "narrow-s0", 8, seen=1000, seconds=50.0),
        training(root / "narrow-s1", 8, seen=400),
        training(root / "wide-s0", 16),
    ]


def flops(task):
    config = OmegaConf.create(task.config)
    return estimate.rehearsal_of(config).step().flops


def test_what_is_left_takes_as_long_as_what_ran(tasks):
    (row,) = estimated([TaskGroup("sweep", tasks)], HERE)
    assert (row.tasks, row.done, row.begun, row.images) == (3, 1, 1, 1600)
    ratio = flops(tasks[2]) / flops(tasks[0])
    assert ratio > 2
    assert row.hours == pytest.approx((600 * 0.05 + 1000 * 0.05 * ratio) / 3600)
    assert (row.source, row.gpus) == ("as narrow-s0", None)


def test_gpus_and_their_price_are_multiplied(tasks, capsys):
    group = TaskGroup("sweep", tasks, resources={"gpus": 4})
    (row,) = estimated([group], Cluster(at_once=1, gpus=0, python=None))
    assert row.gpus == 8
    show([row], price=3.0)
    said = capsys.readouterr().out
    total = row.hours * 8
    assert f"in all {total:,.2f} GPU-hours, {3 * total:,.2f} at 3 an hour" in said
    assert "nothing was started" in said


def test_without_a_run_a_few_steps_are_timed(tasks, monkeypatch):
    monkeypatch.setattr(estimate, "_timed", lambda one, flops: Speed(0.25, flops, estimate.HERE))
    (row,) = estimated([TaskGroup("sweep", tasks[2:])], HERE)
    assert row.hours == pytest.approx(1000 * 0.25 / 3600)
    assert row.source == estimate.HERE
    away = Cluster(at_once=1, gpus=0, python=None)
    (row,) = estimated([TaskGroup("sweep", tasks[2:])], away)
    assert row.hours is None  # this CPU says nothing of the cluster's GPUs


def test_steps_are_timed_on_this_machine(tasks):
    speed = estimate._timed(estimate._training(tasks[1]), 10.0)
    assert 0 < speed.seconds < 60
    assert speed.flops == 10.0


def test_cells_take_as_long_as_those_that_were_measured(tmp_path):
    point = tmp_path / "a-s0"
    point.mkdir()
    cells = [{"point": {}, "seed": 0, "choices": {}, "seconds": s} for s in (10.0, 30.0)]
    (point / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    text = OmegaConf.to_yaml({"choices": {"scale": {1: [], 2: [], 3: []}}})
    done = Task(point / "evaluation", ["measure"], text, done=True)
    left = Task(tmp_path / "b-s0" / "evaluation", ["measure"], text)
    (row,) = estimated([TaskGroup("evaluation", [done, left])], HERE)
    assert row.hours == pytest.approx(3 * 20 / 3600)
    (row,) = estimated([TaskGroup("evaluation", [left])], HERE)
    assert (row.hours, row.source) == (None, "no cell to go by")


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(estimate, "estimated", lambda groups, launcher: seen.extend(groups) or [])
    argv = ["sweep", "--dry-run", "sweep=guidance", f"home={tmp_path / 'home'}"]
    assert main(argv) == 0
    assert {"scenes", "judge", "evaluation"} <= {group.name for group in seen}
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--price", "-1"]) == 2
    assert "give a number above 0" in capsys.readouterr().err
