"""Points of a sweep, cell by cell: what is counted, what goes on, what is measured anew."""

import json
from hashlib import sha256
from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf

from cascade.config.compose import built, composed, saved
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.clip import save_clip
from cascade.eval.sweeps import points
from cascade.eval.sweeps.points import measure_point
from tests.small import SR

TINY = ["data.path=none", "net.channels=8", "net.embed=16", "net.blocks=1", "net.width=32"]
TINY += ["net.head_channels=8", "text.size=8", "text.encoder.heads=2", "text.encoder.layers=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Scenes, an untrained judge, and a sweep's point with an untrained decoder of 64 px."""
    folder = tmp_path_factory.mktemp("home")
    for split, count in (("train", 9), ("val", 24)):
        write_scenes(folder / "shards", "plain", split, count, 64, seed=0)
    torch.manual_seed(0)
    architecture = built(composed("train", [*TINY[:1], "clip.model.dim=4"]).clip.model)
    save_clip(architecture, architecture.build(), folder / "judge")
    run = folder / "point" / "decoder"
    config = composed("train", ["stage=decoder_text", "+net.patch=8", *TINY, f"run={run}"])
    saved(config, run / "config.yaml")
    built(config.stage).export(run)
    (run / "metrics.csv").write_text("images,loss,seconds\n64,0.5,3.0\n128,0.4,7.2\n")
    (folder / "point" / "cascade.yaml").write_text("stages:\n  decoder: {steps: 2}\n")
    asked = {
        "model": str(folder / "point"),
        "data": str(folder / "shards"),
        "judge": str(folder / "judge"),
        "point": {"text": "small"},
        "seed": 3,
        "choices": {
            "scale": {1: ["decoder.scale=1"], 2: ["decoder.scale=2"]},
            "steps": {1: ["decoder.steps=1"], "as trained": []},
        },
        "trained": "decoder",
        "split": "val",
        "count": 8,
    }
    OmegaConf.save(OmegaConf.create(asked), folder / "asked.yaml")
    return folder


def test_every_cell_is_measured_with_its_own_choices(home):
    point = measure_point(home / "asked.yaml")
    folder, found = point.folder, point.cells()
    assert [row["choices"] for row in found] == [
        {"scale": scale, "steps": steps} for scale in (1, 2) for steps in (1, "as trained")
    ]
    # A guided step is two evaluations.
    assert [row["evaluations"] for row in found] == [1, 2, 2, 4]
    for row in found:
        assert (row["point"], row["seed"], row["count"]) == ({"text": "small"}, 3, 16)
        right = sum(row[kind]["whole"] * row[kind]["count"] for kind in ("one", "two"))
        assert row["accuracy"] == right / 16
        assert -1 <= row["clip_score"] <= 1
        assert row["frechet"] > 0
    assert sorted(path.name for path in (folder / "grids").iterdir()) == [
        "scale=1,steps=1.png",
        "scale=1,steps=as trained.png",
        "scale=2,steps=1.png",
        "scale=2,steps=as trained.png",
        "truth.png",
    ]
    cost = json.loads((folder / "cost.json").read_text())
    stage = points.load_cascade(folder).stages[0]
    assert cost["parameters"] == sum(p.numel() for p in stage.parameters())
    assert (cost["images"], cost["hours"]) == (128, 7.2 / 3600)
    assert cost["flops"] > 0


def test_what_is_measured_is_not_measured_again_unless_what_paints_it_changes(home, monkeypatch):
    point = measure_point(home / "asked.yaml")
    folder, before = point.folder, point.cells()
    painted = []
    paint = points.paint
    monkeypatch.setattr(
        points, "paint", lambda *a, **k: painted.append(k["what"]) or paint(*a, **k)
    )
    measure_point(home / "asked.yaml")
    assert not painted
    features = sorted(path.name for path in (home / "shards/features").iterdir())
    assert len(features) == 2  # of the reference and of the training pictures, for all points
    kept = "".join(json.dumps(row) + "\n" for row in before[:3])
    (folder / "cells.jsonl").write_text(kept)  # as a kill leaves it
    measure_point(home / "asked.yaml")
    assert painted == ["decoder.scale=2"]
    again = point.cells()
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in before]
    asked = (home / "asked.yaml").read_text()
    (home / "other.yaml").write_text(asked.replace("decoder.scale=2", "decoder.scale=3"))
    painted.clear()
    measure_point(home / "other.yaml")  # of the same name, but another choice
    assert painted == ["decoder.scale=3 decoder.steps=1", "decoder.scale=3"]
    (folder / "cascade.yaml").write_text("stages:\n  decoder: {steps: 3}\n")
    painted.clear()
    measure_point(home / "other.yaml")  # what all its choices stand on
    assert painted == ["decoder.scale=1", "decoder.scale=3"]
    stage = points.load_cascade(folder).stages[0]
    with torch.no_grad():
        next(stage.parameters()).add_(1)
    stage.export(folder / "decoder")
    painted.clear()
    measure_point(home / "other.yaml")
    assert len(painted) == 4
    assert sorted(path.name for path in (home / "shards/features").iterdir()) == features


def test_cells_that_an_earlier_version_measured_are_not_measured_again(home, monkeypatch):
    """It named the judge by the hash of its weights."""
    file = home / "asked.yaml"
    lines = measure_point(file).cells_file
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    weights = (home / "judge/open_clip_model.safetensors").read_bytes()
    for row in rows:
        assert row["protocol"].pop("judge's weights") == sha256(weights).hexdigest()[:16]
        row["protocol"]["judge"] = sha256(weights).hexdigest()[:16]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(points, "_sample", lambda *_: pytest.fail("measured again"))
    measure_point(file)


def test_a_stage_that_cells_share_is_sampled_once(home, monkeypatch):
    """The numbers are those of cells that are measured one by one."""
    run = home / "two" / "sr256"
    config = composed("train", [*SR, "data.path=none", "size=256", "low=64", f"run={run}"])
    saved(config, run / "config.yaml")
    built(config.stage).export(run)
    told = "stages:\n  decoder: {run: ../point/decoder, steps: 2}\n  sr256: {steps: 2}\n"
    (home / "two" / "cascade.yaml").write_text(told)
    asked = OmegaConf.to_container(OmegaConf.load(home / "asked.yaml"))
    choices = {"steps": {n: [f"sr256.steps={n}"] for n in (1, 2)}}
    choices |= {"scale": {n: [f"decoder.scale={n}"] for n in (1, 2)}}
    asked |= {"model": str(home / "two"), "choices": choices, "trained": None, "count": 2}
    OmegaConf.save(OmegaConf.create(asked), home / "two.yaml")
    sampled, paint = [], points.paint

    def painting(cascade, *args, **options):
        sampled.extend(stage.writes for stage in cascade.stages)
        return paint(cascade, *args, **options)

    monkeypatch.setattr(points, "paint", painting)
    found = measure_point(home / "two.yaml").cells()
    assert sorted(sampled) == 4 * ["image_256"] + 2 * ["image_64"]
    assert [row["evaluations"] for row in found] == [3, 5, 4, 6]
    for row in found[1:3]:
        one = {axis: {n: choices[axis][n]} for axis, n in row["choices"].items()}
        OmegaConf.save(OmegaConf.create({**asked, "choices": one}), home / "two.yaml")
        (home / "two" / "cells.jsonl").unlink()
        (alone,) = measure_point(home / "two.yaml").cells()
        assert {**alone, "seconds": 0} == {**row, "seconds": 0}


def test_of_training_pictures_the_nearest_is_itself(home, monkeypatch):
    from cascade.data.loading import collate
    from cascade.data.shards import Shards
    from cascade.data.transforms import Pictures
    from cascade.encoders.clip import FrozenCLIP
    from cascade.eval.cascades import nearest
    from cascade.eval.metrics.features import CLIPFeatures

    shards = Shards(home / "shards", Pictures((64,)), shuffle=False)
    pictures = collate([shards[n] for n in range(9)])["image_64"]
    texts, grid = [], nearest.grid
    monkeypatch.setattr(nearest, "grid", lambda *a: texts.extend(a[2]) or grid(*a))
    features = CLIPFeatures(FrozenCLIP(str(home / "judge")))
    for _ in range(2):  # the second time from the file
        nearest.nearest(pictures, [str(n) for n in range(9)], home / "shards", features)
    firsts = [after for text, after in pairwise(texts) if text.startswith("painted")]
    assert firsts == ["cosine 1.000"] * 16
