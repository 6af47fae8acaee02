"""A sweep: its grid, its chain, what is passed over, what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import cascade.conf
from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.errors import UserError
from cascade.eval.sweeps.plan import describe, grid, joined, points
from cascade.runs.cascade_file import stage_runs
from cascade.slurm.chain import split
from cascade.slurm.plan import TaskGroup, launch
from tests.launching import by_name, in_queue, launcher, tasks

CONF = Path(next(iter(cascade.conf.__path__)))


def test_a_grid_is_every_combination_by_name():
    axes = {"text": {"small": ["a=1", "b=2"], "large": []}, "net": {"x": ["net=x"]}}
    found = list(points(OmegaConf.create({"axes": axes, "seeds": [0, 3]})))
    assert [name for name, *_ in found] == ["small-x-s0", "large-x-s0", "small-x-s3", "large-x-s3"]
    assert found[2][1:] == (3, {"text": "small", "net": "x"}, ["a=1", "b=2", "net=x"])


def test_the_last_of_several_overrides_counts():
    assert joined(["stage=a", "+x=1"], ["stage=b"], ["x=2", "y=3"]) == ["stage=b", "x=2", "y=3"]
    assert split(["run=x", "launcher.gpus=2", "+launcher=a", "runs=3"], ["run", "launcher"]) == (
        ["run=x", "launcher.gpus=2", "+launcher=a"],
        ["runs=3"],
    )


SWEEPS = [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_part_of_every_sweep_builds(name, tmp_path):
    config = composed("sweep", [f"sweep={name}", f"home={tmp_path}", "run=${home}/x", "seeds=[0]"])
    links = by_name(grid(config, [], launcher("launcher=slurm")))
    configs = [task.config for link in links.values() for task in link.tasks if task.config]
    whole = [yaml.safe_load(text) for text in configs]
    stages = [of.get("stage") for of in whole]
    with torch.device("meta"):
        for stage in {json.dumps(stage): stage for stage in stages if stage}.values():
            built(stage)
    if name in ("scenes", "unclip_scenes"):  # what others are built on
        return
    assert config.question
    assert config.paper
    assert config.along in {**config.axes, **config.choices}
    runs = {(of or {}).get("run", stage) for stage, of in config.cascade.items()}
    assert {"judge", *runs} - {config.train} <= set(config.needs)
    # Who judges conditions no stage, and teaches none.
    taught = [[of.get("alignment"), of.get("perceptual")] for of in whole]
    assert not any(str(config.judge) in json.dumps(part) for part in [*stages, *taught])
    for sets in (sets for axis in config.choices.values() for sets in axis.values()):
        assert all(choice.partition(".")[0] in config.cascade for choice in sets)


def test_a_sweep_is_a_chain_from_what_its_points_share_to_its_report(tmp_path):
    config = composed("sweep", ["sweep=guidance_kinds", f"home={tmp_path / 'home'}"])
    links = by_name(grid(config, [], launcher("launcher=slurm")))
    assert {name: list(link.after) for name, link in links.items()} == {
        "scenes": [],
        "clip_96": ["scenes"],
        "judge": ["scenes"],
        "precompute": ["scenes", "clip_96"],
        "prior": ["scenes", "clip_96", "precompute"],
        "decoder": ["scenes", "precompute"],
        "decoder_weaker": ["scenes", "precompute"],
        "sr64": ["scenes"],
        "evaluation": [name for name in links if name not in ("evaluation", "report")],
        "report": ["evaluation"],
    }
    config = composed("sweep", ["sweep=degradations", f"home={tmp_path / 'home'}"])
    links = by_name(grid(config, ["images=7"], launcher("launcher=slurm")))
    assert links["evaluation"].each_after == "sweep"
    assert "sweep" not in links["evaluation"].after
    folders = [str(t.folder.relative_to(tmp_path / "home")) for t in links["sweep"].tasks]
    names = [f"{c}-s{seed}" for seed in (0, 1) for c in ("clean", "blur", "bsr", "noise")]
    assert folders == [f"degradations/{name}/sr64" for name in names]
    frozen = [yaml.safe_load(task.config) for task in links["sweep"].tasks]
    assert [(c["seed"], c["images"]) for c in frozen] == [(s, 7) for s in (0, 1) for _ in range(4)]
    assert {c["data"]["path"] for c in frozen} == {str(tmp_path / "home" / "shards")}
    describe(config, tmp_path / "home" / "degradations")
    point = tmp_path / "home/degradations/blur-s1"
    runs = stage_runs(point / "cascade.yaml")
    assert {name: run.resolve().relative_to(tmp_path / "home") for name, run in runs.items()} == {
        "prior": Path("prior"),
        "decoder": Path("decoder"),
        "sr64": Path("degradations/blur-s1/sr64"),
    }


def test_a_cell_that_takes_another_run_finds_it_beside_the_sweep(tmp_path):
    config = composed("sweep", ["sweep=priors", f"home={tmp_path / 'home'}"])
    links = by_name(grid(config, [], launcher("launcher=slurm")))
    describe(config, tmp_path / "home" / "priors")
    (asked, *_) = [yaml.safe_load(task.config) for task in links["evaluation"].tasks]
    sets = asked["choices"]["embedding"]["ar_prior"]
    runs = stage_runs(Path(asked["model"]) / "cascade.yaml", sets)
    assert runs["prior"].resolve() == tmp_path / "home" / "prior_ar"
    assert asked["seed"] == 0


def test_an_evaluation_is_passed_over_until_what_it_measures_changes(tmp_path):
    config = composed("sweep", ["sweep=guidance", f"home={tmp_path}"])

    def left():
        links = by_name(grid(config, [], launcher("launcher=slurm")))
        return [task.folder.parent.name for task in links["evaluation"].tasks if not task.done]

    names = ["s0", "s1", "s2"]
    cells = len(config.choices.scale)
    assert left() == names
    links = by_name(grid(config, [], launcher("launcher=slurm")))
    for task in links.pop("evaluation").tasks[:2]:
        task.folder.mkdir(parents=True)
        (task.folder / "frozen.yaml").write_text(task.config)
        (task.folder / "done").touch()
        (task.folder.parent / "cells.jsonl").write_text(cells * "{}\n")
    assert left() == names  # nothing is trained
    del links["report"]
    for task in [task for link in links.values() for task in link.tasks]:
        task.folder.mkdir(parents=True)
        (task.folder / "done").touch()
        if task.config:
            (task.folder / "weights.safetensors").touch()
            (task.folder / "status.json").write_text('{"images": 10000000}')
            os.utime(task.folder / "status.json", (1, 1))
    command = links["precompute"].tasks[0].command
    rows = Path(command[command.index("--out") + 1])
    rows.mkdir(parents=True)
    for name in [f"{part}-{n:05d}" for part in ("train", "val", "unseen") for n in range(10)]:
        (tmp_path / f"shards/{name}.tar").touch()
        (rows / f"{name}.safetensors").touch()
    assert left() == ["s2"]
    measured = tmp_path / "guidance" / "s0" / "cells.jsonl"
    measured.write_text((cells - 1) * "{}\n")  # a node was lost, and srun ended with 0
    assert left() == ["s0", "s2"]
    measured.write_text(cells * "{}\n")
    config.shared.sr64.append("images=10_000_001")  # which are trained first
    assert left() == names
    config.shared.sr64.pop()
    config.evaluate.count = 7
    assert left() == names
    config.evaluate.count = 150
    (tmp_path / "sr64/status.json").write_text("{}")
    os.utime(tmp_path / "sr64/status.json", (2**32, 2**32))
    assert left() == names


def test_a_sweep_that_needs_what_nobody_trains_is_refused(tmp_path):
    config = composed("sweep", ["sweep=guidance", f"home={tmp_path}", "needs=[clip_7]"])
    with pytest.raises(UserError, match="clip_7"):
        grid(config, [], launcher("launcher=slurm"))
    config = composed("sweep", ["sweep=text_x_unet", f"home={tmp_path}", "train=null"])
    with pytest.raises(UserError, match="train"):
        grid(config, [], launcher("launcher=slurm"))


def test_a_sweep_is_one_array_and_goes_on_with_what_is_missing(programs, tmp_path):
    root = tmp_path / "sweep"
    arguments = ["sweep", "sweep=text_x_unet", "launcher=slurm", f"home={tmp_path / 'home'}"]
    arguments += [f"run={root}", "data.path=none", "scenes=null"]
    arguments += ["~axes.text.clip_192", "~axes.unet.unet_48"]
    assert main(arguments) == 0
    script = (root / "launch/1/sweep/script.sh").read_text()
    assert "--array=0-11" in script
    finished, queued = root / "clip_32-unet_16-s0/decoder", root / "clip_96-unet_32-s1/decoder"
    frozen = yaml.safe_load((finished / "frozen.yaml").read_text())
    total = frozen["images"]
    assert frozen["data"]["path"] == "none"
    (finished / "status.json").write_text(json.dumps({"images": total, "total": total}))
    (finished / "weights.safetensors").touch()
    index = sorted(root.glob("*/decoder"), key=lambda f: script.index(f" folder={f} "))
    index = index.index(queued)
    record = root / "launch/1/sweep/tasks.json"
    in_queue(programs, (f"101_{index}", "RUNNING", 0, "None", record, index))
    assert main(arguments) == 0
    again = (root / "launch/2/sweep/script.sh").read_text()
    assert "--array=0-9" in again
    assert f"folder={finished} " not in again
    assert f"folder={queued} " not in again


def test_two_tasks_of_one_directory_are_refused(programs, tmp_path):
    with pytest.raises(UserError, match="b would be the directory of two"):
        launch(launcher("launcher=slurm"), tmp_path, [TaskGroup("sweep", tasks(tmp_path, *"abb"))])
    assert not (programs / "asked").exists()
