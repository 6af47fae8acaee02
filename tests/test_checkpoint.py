"""Checkpoints on the disk, without a training: whole, damaged, half written, without room."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cascade.errors import TryAgain, UserError
from cascade.runs.run import Position
from cascade.training import checkpoint
from cascade.training.callbacks.ema import EMA
from cascade.training.callbacks.saving import Checkpoints
from cascade.training.checkpoint import CheckpointFolders, newest_checkpoint


def saved(run, step, io=None):
    """Writes a small checkpoint; returns its directory."""
    io, path = io or CheckpointFolders(), run / "checkpoints" / f"step-{step:08d}"
    position = {"step": step, "images": 4 * step, "consumed": 4 * step + 1, "offset": 1, "ranks": 1}
    io.save_checkpoint({"position": position, "weights": torch.full((300,), float(step))}, path)
    return path


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_anywhere_is_seen_and_the_checkpoint_before_serves(tmp_path, capsys):
    good, bad = saved(tmp_path, 2), saved(tmp_path, 3)
    assert newest_checkpoint(tmp_path) == (bad, 3, 13)
    for file in bad.iterdir():
        size = file.stat().st_size
        for place in range(0, size, 1 if file.suffix == ".json" else 97):
            flip(file, place)
            assert newest_checkpoint(tmp_path) == (good, 2, 9), (file, place)
            assert f"{bad.name}: {file.name}" in capsys.readouterr().out
            flip(file, place)
    assert newest_checkpoint(tmp_path) == (bad, 3, 13)


def test_what_is_not_whole_is_passed_over(tmp_path, capsys):
    assert newest_checkpoint(tmp_path) is None
    good = saved(tmp_path, 2)
    for number, (damage, says) in enumerate(
        {
            lambda path: (path / "state.pt").unlink(): "No such file",
            lambda path: (path / "manifest.json").unlink(): "manifest.json cannot be read",
            lambda path: (path / "state.pt").write_bytes(b"half"): "state.pt has 4 of",
            lambda path: path.rename(path.with_name("step-00000099")): "manifest.json has changed",
        }.items(),
        start=3,
    ):
        damage(saved(tmp_path, number))
        assert newest_checkpoint(tmp_path) == (good, 2, 9)
        assert says in capsys.readouterr().out
    shutil.copytree(good, good.with_name(f".step-00000200.here.1{checkpoint.REST}"))
    assert newest_checkpoint(tmp_path) == (good, 2, 9)
    shutil.rmtree(good)
    with pytest.raises(UserError, match="no intact checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("at", ["the room", "state.pt", "manifest.json", "the flush", "the name"])
def test_a_full_disk_leaves_the_checkpoints_before_and_nothing_else(at, tmp_path, monkeypatch):
    good, io = saved(tmp_path, 2), CheckpointFolders()
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args, **kwargs):
        raise full

    if at == "the room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    elif at == "state.pt":
        monkeypatch.setattr(
            checkpoint._Hashed,
            "write",
            lambda self, data: setattr(self, "error", full) or len(data),
        )
    elif at == "manifest.json":
        monkeypatch.setattr(Path, "write_text", refuse)
    else:
        monkeypatch.setattr("os.fsync" if at == "the flush" else "os.replace", refuse)
    saved(tmp_path, 3, io)
    assert io.failure.errno == errno.ENOSPC
    if at == "the room":
        assert "1 MiB are needed, and 0 MiB are free" in str(io.failure)
    assert [*(tmp_path / "checkpoints").iterdir()] == [good]
    assert newest_checkpoint(tmp_path) == (good, 2, 9)


def test_an_error_while_a_checkpoint_is_written_does_not_end_the_process(tmp_path):
    """torch's writer writes once more when it is deleted, by when the file is closed."""
    with open(tmp_path / "state.pt", "wb") as file:
        hashed = checkpoint._Hashed(file)
        writer = torch._C.PyTorchFileWriter(hashed)
        writer.write_record("data", b"1234", 4)
    # Asked before the deletion, in which an error would end all tests.
    assert hashed.write(memoryview(b"end")) == 3
    del writer


def test_ranks_that_see_different_checkpoints_do_not_start(tmp_path):
    def trainer(*steps):
        gathered = SimpleNamespace(root_device="cpu", all_gather=lambda _: torch.tensor(steps))
        return SimpleNamespace(strategy=gathered)

    callback = Checkpoints(tmp_path, EMA(), Position(5, batch=4), total=8)
    callback.setup(trainer(5, 5), None, "fit")
    with pytest.raises(TryAgain, match="different checkpoints"):
        callback.setup(trainer(5, 3), None, "fit")
