"""What `done` says, and when it is believed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from cascade.cli import main
from cascade.errors import Superseded
from cascade.runs.done import begin, finish, finished


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Begins an attempt of a task, as a launcher does; returns its folder."""

    def start():
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("CASCADE_FOLDER", str(folder))
        monkeypatch.setenv("CASCADE_ATTEMPT", str(begin(folder)))
        return folder

    return start


def test_a_command_says_what_it_has_left_when_a_launcher_started_it(task, tmp_path):
    shards, sizes = tmp_path / "shards", ["--train", "2", "--unseen", "0", "--size", "16"]
    command = ["data", "scenes", str(shards), *sizes, "--val", "1"]
    folder = task()
    assert not finished(folder)
    assert main(command) == 0
    about = json.loads((folder / "done").read_text())
    paths = sorted(shards.glob("*.tar"))
    assert about["attempt"] == 1
    assert about["outputs"] == {
        f"../shards/{path.name}": {
            "bytes": path.stat().st_size,
            "sha256 of its ends": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }
    assert finished(folder)
    task()
    assert not finished(folder)  # what begins is not finished
    assert main(command) == 0
    assert finished(folder)
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    assert not finished(folder)
    paths[0].unlink()
    assert not finished(folder)


def test_of_a_large_file_size_and_ends_are_compared(task, tmp_path):
    folder, file = task(), tmp_path / "weights"
    file.write_bytes(bytes(10**6))
    finish([file])
    for place, same in ((0, False), (500_000, True), (999_999, False)):
        data = bytearray(10**6)
        data[place] = 1
        file.write_bytes(data)
        assert finished(folder) == same
    file.write_bytes(bytes(10**6 + 1))
    assert not finished(folder)


def test_an_older_attempt_finishes_nothing(task, tmp_path, monkeypatch):
    folder = task()
    task()
    finish([])
    newer = (folder / "done").read_text()
    monkeypatch.setenv("CASCADE_ATTEMPT", "1")
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        finish([])
    assert (folder / "done").read_text() == newer
    (folder / "done").write_text(newer.replace("2", "1"))  # had it been faster
    assert not finished(folder)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"])
def test_only_the_first_rank_says_so(variable, task, monkeypatch):
    folder = task()
    monkeypatch.setenv(variable, "1")
    finish([])
    assert not (folder / "done").exists()


def trained(folder, images, total=10_000_000, done=""):
    """As the versions before this one left a training; None: without `done`."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"batch: 4\nimages: {total}\n")
    if images:
        (folder / "status.json").write_text(json.dumps({"images": images, "total": total}))
        (folder / "weights.safetensors").touch()
    if done is not None:
        (folder / "done").write_text(done)
    return folder


def test_an_empty_mark_is_judged_by_what_lies_there(tmp_path):
    """Older versions left it whenever srun ended with 0, as for a training of a lost node."""
    assert not finished(trained(tmp_path / "lost", 10_300))
    assert not finished(trained(tmp_path / "lost at once", 0))
    assert finished(trained(tmp_path / "well", 10_000_000))
    assert finished(trained(tmp_path / "by hand", 10_000_000, done=None))
    assert finished(tmp_path / "by hand", images=400)
    assert not finished(tmp_path / "by hand", images=10_000_001)
    assert not finished(trained(tmp_path / "garbage", 10_000_000, done="garbage"))
    other = tmp_path / "scenes"
    other.mkdir()
    assert not finished(other)
    (other / "done").touch()
    assert finished(other)
    assert not finished(other, there=lambda: False)


def test_scenes_of_a_shard_are_as_many_as_a_launch_expects():
    import inspect

    from cascade.data.scenes.generate import write_scenes
    from cascade.slurm import chain

    default = inspect.signature(write_scenes).parameters["shard_size"].default
    assert default == chain._SCENES


def test_a_training_that_is_finished_but_for_its_weights_says_so(task, tmp_path, capfd):
    folder, run = task(), tmp_path / "run"
    torch.manual_seed(0)
    small = ["stage=sr256", "size=16", "low=8", "crop=null", "batch=4", "images=4", "warmup=8"]
    small += ["grids=0", "net.net.channels=8", "net.net.patch=2", "net.net.embed=16"]
    shards = ["data", "scenes", str(tmp_path / "shards"), "--train", "9", "--val", "0"]
    assert main([*shards, "--unseen", "0", "--size", "16"]) == 0
    command = ["train", *small, f"data.path={tmp_path / 'shards'}", f"run={run}"]
    task()
    assert main(command) == 0
    listed = json.loads((folder / "done").read_text())["outputs"]
    assert sorted(listed) == ["../run/status.json", "../run/weights.safetensors"]
    assert finished(run)
    assert finished(folder)
    Path(run / "weights.safetensors").unlink()
    assert not finished(folder)
    assert main(command) == 2
    assert "its weights are gone" in capfd.readouterr().err
