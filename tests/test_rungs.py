"""Successive halving cuts what is worse beyond doubt, and says why."""

import json

import pytest
from omegaconf import OmegaConf

from cascade.cli import main
from cascade.config.compose import composed, differences
from cascade.errors import UserError
from cascade.eval.metrics.interval import of_share
from cascade.eval.sweeps.folder import Point
from cascade.eval.sweeps.page import write_page
from cascade.eval.sweeps.plan import grid
from cascade.eval.sweeps.results import read_sweep
from cascade.eval.sweeps.rungs import all_cut, decide, decided, measure_named, said
from cascade.slurm.local import Local
from tests.made_sweeps import about

HERE = Local(at_once=1, gpus=0, python=None)
ACCURACY, FRECHET = measure_named("accuracy"), measure_named("frechet")


def point(folder, *rates, count=150, frechet=None):
    folder.mkdir(parents=True)
    rows = [
        {
            "point": {}, "seed": 0, "choices": {"scale": i}, "accuracy": rate, "count": 2 * count,
            "one": {"count": count}, "two": {"count": count},
            **({"frechet": frechet[0], "intervals": {"frechet": frechet[1:]}} if frechet else {}),
        }
        for i, rate in enumerate(rates)
    ]  # fmt: skip
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_only_what_is_worse_beyond_doubt_is_cut(tmp_path):
    settings = {
        "best": [point(tmp_path / "best-s0", 0.2, 0.90), point(tmp_path / "best-s1", 0.88)],
        "near": [point(tmp_path / "near-s0", 0.80), point(tmp_path / "near-s1", 0.86)],
        "split": [point(tmp_path / "split-s0", 0.30), point(tmp_path / "split-s1", 0.87)],
        "poor": [point(tmp_path / "poor-s0", 0.60), point(tmp_path / "poor-s1", 0.70)],
        "control": [point(tmp_path / "control-s0", 0.10)],
    }
    cut = decide(tmp_path, 0.25, ACCURACY, settings, {"control"})
    # The mean of "split" is the worst, but one of its seeds is as good as the best.
    assert cut.keys() == {"poor"}
    assert cut["poor"].interval == (of_share(0.60, 300)[0], of_share(0.70, 300)[1])
    assert cut["poor"].best_interval == (of_share(0.88, 300)[0], of_share(0.90, 300)[1])
    assert "poor was cut after 25% of the images" in said("poor", cut["poor"])
    assert [rung["share"] for rung in decided(tmp_path)] == [0.25]
    left = {name: of for name, of in settings.items() if name not in cut}
    assert not decide(tmp_path, 0.5, ACCURACY, left, {"control"})
    assert all_cut(tmp_path) == cut
    assert [rung["share"] for rung in decided(tmp_path)] == [0.25, 0.5]


def test_less_of_a_distance_is_better(tmp_path):
    settings = {
        "near": [point(tmp_path / "a", 0.1, frechet=(1.0, 0.8, 1.2))],
        "far": [point(tmp_path / "b", 0.9, frechet=(3.0, 2.5, 3.5))],
        "between": [point(tmp_path / "c", 0.9, frechet=(1.3, 1.1, 1.6))],
    }
    assert decide(tmp_path, 0.5, FRECHET, settings, ()).keys() == {"far"}


def test_without_an_interval_nothing_is_cut(tmp_path):
    settings = {"a": [point(tmp_path / "a", 0.5)]}
    with pytest.raises(UserError, match="choose another rung_measure"):
        decide(tmp_path, 0.5, measure_named("clip_score"), settings, ())
    with pytest.raises(UserError, match="rung_measure=loss: choose one of"):
        measure_named("loss")
    assert not decided(tmp_path)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    given = ["sweep=captions", f"home={root}", "rungs=[0.25]", "seeds=[0]"]
    return composed("sweep", given)


def test_a_rung_is_the_beginning_of_the_whole_training(config):
    cut = {"95", "100"}
    at = {share: grid(config, [], HERE, share, cut) for share in (0.25, 1.0)}
    named = {share: {group.name: group for group in groups} for share, groups in at.items()}
    short, whole = (named[share]["sweep"].tasks for share in (0.25, 1.0))
    assert [task.folder.parent.name for task in short] == ["0-s0", "65-s0"]
    for task, other in zip(short, whole, strict=True):
        told = differences(OmegaConf.create(other.config), OmegaConf.create(task.config))
        assert told == ["images: 40000 -> 10000"]  # the learning rate falls as in the whole
    assert len(named[0.25]["evaluation"].tasks) == 2


def test_the_report_leaves_out_what_was_cut_and_says_so(tmp_path):
    for name, rate in {"0": 0.9, "65": 0.3}.items():
        point(tmp_path / f"{name}-s0", rate)
    folders = {name: [tmp_path / f"{name}-s0"] for name in ("0", "65")}
    assert decide(tmp_path, 0.25, ACCURACY, folders, ()).keys() == {"65"}
    told = about({"long": ["0", "65"]}, {"scale": ["0"]}, seeds=[0])
    why = {name: list(of) for name, of in all_cut(tmp_path).items()}
    (tmp_path / "sweep.json").write_text(json.dumps({**told, "cut": why}))
    for folder in folders.values():
        rows = [{**row, "point": {"long": folder[0].name[:-3]}} for row in Point(folder[0]).cells()]
        Point(folder[0]).write_cells(rows)
    sweep = read_sweep(tmp_path)
    assert [row["long"] for row in sweep.rows] == [0.0]
    write_page(sweep, tmp_path / "report.html")
    assert "65 was cut after 25% of the images" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("rungs", ["[0.5,0.25]", "[1]", "[0]"])
def test_shares_rise_between_nothing_and_all(rungs, tmp_path, capsys):
    argv = ["sweep", "--dry-run", "sweep=captions", f"home={tmp_path}", f"rungs={rungs}"]
    assert main(argv) == 2
    assert "give rising shares between 0 and 1" in capsys.readouterr().err
