"""The benchmarks of sampling and of the demo, on a cascade of one untrained stage."""

import json
import sys

import pytest
import torch
from omegaconf import OmegaConf

from cascade.config.compose import built, composed, saved
from cascade.errors import UserError
from cascade.eval.benchmarks import demo, gpu, points, sampling, serve
from cascade.eval.sweeps import points as sweep_points
from cascade.runs.cascade_file import stage_runs
from cascade.training.rehearsal import rehearsed
from tests.small import SR


def text(table):
    return [list(column.cells) for column in table.columns]


def test_evaluations_are_counted_by_stage(tmp_path):
    for name, size, low in (("a", 16, 8), ("b", 32, 16)):
        given = [f"size={size}", f"low={low}", f"run={tmp_path / name}", "data.path=none"]
        config = composed("train", [*SR, *given])
        saved(config, tmp_path / name / "config.yaml")
        built(config.stage).export(tmp_path / name)
    (tmp_path / "cascade.yaml").write_text("stages:\n  b: {steps: 3}\n")
    paint = sampling.paint

    def painting(cascade, captions, given, **options):
        low = torch.zeros(len(captions), 3, 16, 16)
        return paint(cascade, captions, given={**given, "image_16": low}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "paint", painting)
        _, models, stages, evaluations, seconds = text(sampling.warm({"model": tmp_path}))
    assert models == ["model", "model"]
    assert stages == ["image_32", "all"]
    assert evaluations == ["3", "3"]
    assert float(seconds[0]) == float(seconds[1])


def test_a_demo_is_read_and_compared(tmp_path):
    for name, seconds in (("before", 10), ("now", 4)):
        run = tmp_path / name / "decoder"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(f"images,loss,seconds\n64,0.5,3.0\n128,0.4,{seconds}\n")
        right = {"image_256": {"one": {"binding": 0.9}, "two": {"whole": 0.25}}}
        metrics = {"seconds": 5, "val": right}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
        parts = [{"wall": seconds, "cpu": 1, "memory": 100}, {"wall": 10, "cpu": 2, "memory": 50}]
        (tmp_path / name / "took.json").write_text(json.dumps(parts))
    found = [demo.demo(tmp_path / "none", tmp_path / name, "smoke") for name in ("before", "now")]
    rows = {row[0]: row[1:] for row in zip(*text(demo.table(*found)))}
    assert rows["wall"] == ("20", "14", "0.70")
    assert rows["memory"] == ("100", "100", "1.00")
    assert rows["decoder"] == ("10", "4", "0.40")
    assert rows["evaluation"] == ("5", "5", "1.00")
    assert rows["one object"] == ("90.0%", "90.0%", "")


def test_a_command_is_timed_and_its_failure_is_an_error():
    block = "x = b'1' * 2**26; import time; time.sleep(0.2)"
    took = demo.took([sys.executable, "-c", block])
    assert took["wall"] >= 0.2
    assert took["memory"] > 64
    with pytest.raises(UserError, match="ended with 3"):
        demo.took([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
def test_training_rates_on_a_gpu_are_measured_at_tiny_sizes():
    tiny = ["experiment=unclip_prior_tiny", "clip=tiny"]
    found = gpu.rates(tiny, 2, 1, "cpu", backend="eager")
    assert set(found) == {"eager", "compiled"}
    flops = rehearsed(tiny)[1].step(bf16=True).flops
    for each, rate in found.values():
        assert rate / each == pytest.approx(flops)
    rate = gpu.matrix_rate("cpu", side=64, steps=1)
    training, _, shown = text(gpu.table({"prior": found}, rate))[:3]
    assert training == ["prior", "prior"]
    assert float(shown[0].replace(",", "")) == pytest.approx(found["eager"][0], abs=0.06)


def test_a_points_cells_are_measured_and_compared(tmp_path):
    model = tmp_path / "demo"
    model.mkdir()
    (model / "cascade.yaml").write_text("stages:\n  decoder: {steps: 6}\n  sr64:\n")
    choices = points.axes(["decoder.scale=1,2", "sr64.level=0,0.1"])
    asked = sweep_points.Grid(**OmegaConf.load(points.point(tmp_path / "point", model, choices, 3)))
    made = [sets for _, sets in sweep_points.cells(asked.choices)]
    assert made == [
        ["decoder.scale=1", "sr64.level=0"],
        ["decoder.scale=1", "sr64.level=0.1"],
        ["decoder.scale=2", "sr64.level=0"],
        ["decoder.scale=2", "sr64.level=0.1"],
    ]
    runs = stage_runs(tmp_path / "point/cascade.yaml")
    assert runs == {"decoder": model / "decoder", "sr64": model / "sr64"}
    points.point(tmp_path / "less", model, choices, 3, "decoder")
    assert [*stage_runs(tmp_path / "less/cascade.yaml")] == ["decoder"]
    with pytest.raises(UserError, match="--last sr256: the stages are decoder, sr64"):
        points.point(tmp_path / "none", model, choices, 3, "sr256")
    cell = {"frechet": 2.0, "one": {"whole": 0.5}, "seconds": 9.0}
    other = {"frechet": 2.0, "one": {"whole": 0.4}, "seconds": 3.0}
    assert points.difference(cell, other) == pytest.approx(0.2)
    for wrong in ("decoder=1", "decoder.scale", "decoder.scale=1,"):
        with pytest.raises(UserError, match="OPTION=VALUE"):
            points.axes([wrong])


def test_the_page_is_compared_with_painting_alone():
    found = serve.Found(
        address=4.0, usable=5.0, alone=[0.2, 0.4, 0.3], step=[0.03, 0.06, 0.9],
        preview=[0.15, 0.1, 0.2], finished=[0.6, 0.3, 0.45], swipe=[0.01, 0.02], menu=[0.03],
    )  # fmt: skip
    names, seconds, ratios = text(serve.table(found))
    assert dict(zip(names, ratios))["click to finished"] == "1.50"
    assert dict(zip(names, ratios))["click to first picture so far"] == "0.50"
    assert dict(zip(names, ratios))["first step in this process"] == "0.20"
    assert seconds[-2:] == ["0.020", "0.030"]
