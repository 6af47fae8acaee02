"""Who may write into a run's directory: dead and living holders, newer and older attempts."""

import errno
import json
import os
import resource
import subprocess
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from cascade.cli import main
from cascade.errors import Superseded, UserError
from cascade.eval.sweeps.points import measure_point
from cascade.files import lease as module
from cascade.files import locks as claims_module
from cascade.files.atomic import write_atomically
from cascade.files.lease import BOUND, GRACE, NAME, Lease, lease
from cascade.files.locks import BEAT, SILENCE, ClaimFiles, Claims, Holder
from cascade.runs.run import Position
from cascade.training.callbacks.ema import EMA
from cascade.training.callbacks.interruption import Interruption
from cascade.training.callbacks.saving import Checkpoints


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Beats and bounds of milliseconds; a bound that a test waits for has its own."""
    monkeypatch.setattr(claims_module, "BEAT", 0.02)
    monkeypatch.setattr(claims_module, "SILENCE", 30.0)
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(module, "BOUND", 30.0)


def left_by(folder, number=4, text=None, **facts):
    """The claim file of another holder, such as one that did not let go of it."""
    files = ClaimFiles(folder, NAME)
    assert files.make(number)
    holder = replace(Holder.here(), **facts)
    files.path(number).write_text(json.dumps(asdict(holder)) if text is None else text)
    return files.path(number)


@pytest.fixture
def sleeper():
    """Another process of this machine."""
    with subprocess.Popen(["sleep", "60"]) as process:
        started = claims_module._process(process.pid)[1]

        def kill():  # nobody waits for it: it is a zombie then, and dead
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        yield SimpleNamespace(pid=process.pid, started=started, kill=kill)
        process.kill()


def seconds(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def take(folder):
    with lease(folder) as held:
        held.check()


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path, sleeper):
    left_by(tmp_path, pid=sleeper.pid, started=sleeper.started)
    with pytest.raises(UserError, match=f"process {sleeper.pid} on .*let it end, or end it"):
        take(tmp_path)
    sleeper.kill()
    assert seconds(lambda: take(tmp_path)) < 5
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.claim-5"]
    left_by(tmp_path, 6, started="another process had this number")
    assert seconds(lambda: take(tmp_path)) < 5


def test_a_process_elsewhere_is_alive_as_long_as_its_file_is_touched(tmp_path, monkeypatch):
    """Whatever its clock says: here it goes backwards, a century ahead."""
    monkeypatch.setattr(claims_module, "SILENCE", 0.5)
    path, dead = left_by(tmp_path, host="far", place="away", pid=1), threading.Event()

    def beat():
        century = 4e9
        while not dead.wait(0.02):
            century -= 100
            os.utime(path, (century, century))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 1 on far"):
            take(tmp_path)
    finally:
        dead.set()
        thread.join()
    assert 0.4 < seconds(lambda: take(tmp_path)) < 5


def test_what_is_half_written_holds_until_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "SILENCE", 0.3)
    left_by(tmp_path, text="")
    assert seconds(lambda: take(tmp_path)) > 0.25


def test_a_claim_that_a_full_disk_cuts_short_leaves_nothing(tmp_path):
    """Else the next process would have to wait until a holder that nobody knows is silent."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write to"):
            take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]
    assert seconds(lambda: take(tmp_path)) < 1


def attempt(monkeypatch, number):
    monkeypatch.setenv("CASCADE_ATTEMPT", str(number))


def in_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_newer_attempt_waits_until_the_older_has_let_go(tmp_path, monkeypatch):
    attempt(monkeypatch, 1)
    older = Lease(tmp_path)
    older.take()
    attempt(monkeypatch, 2)
    newer, taken = Lease(tmp_path), threading.Event()
    thread = in_thread(lambda: (newer.take(), taken.set()))
    while not older.lost:  # it sees by itself, at a beat
        time.sleep(0.01)
    with pytest.raises(Superseded, match=r"taken over by process .*attempt 2"):
        older.check()
    assert not taken.wait(0.2)  # it is alive, and may be in the middle of a step
    older.release()
    thread.join(5)
    assert taken.is_set()
    newer.check()
    attempt(monkeypatch, 1)
    with pytest.raises(Superseded, match="a newer attempt"):
        Lease(tmp_path).take()
    newer.check()
    newer.release()


def test_a_newer_attempt_waits_no_longer_than_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BOUND", 0.4)
    attempt(monkeypatch, 1)
    older = Lease(tmp_path)
    older.take()  # and hangs, while its thread goes on to touch the file
    attempt(monkeypatch, 2)
    newer = Lease(tmp_path)
    assert 0.3 < seconds(newer.take) < 5
    older.release()
    newer.check()
    newer.release()


def test_the_bounds_add_up():
    """A beat and a late look until the older attempt sees it, and its grace: then it has ended."""
    assert max(SILENCE, BOUND) <= 240
    assert BEAT + 60 + GRACE + BEAT < BOUND


def test_nothing_is_renamed_into_a_folder_whose_lease_is_lost(tmp_path):
    run, beside = tmp_path / "run", tmp_path / "beside"
    with lease(run):
        write_atomically(run / "deep" / "a", lambda path: path.write_text("first"))
        ClaimFiles(run, NAME).make(1)
        with pytest.raises(Superseded):
            write_atomically(run / "deep" / "a", lambda path: path.write_text("second"))
        write_atomically(beside, lambda path: path.write_text("elsewhere"))
    write_atomically(run / "b", lambda path: path.write_text("behind it"))
    assert (run / "deep" / "a").read_text() == "first"
    assert [path.name for path in (run / "deep").iterdir()] == ["a"]


def test_a_number_is_never_given_twice(tmp_path):
    stale = Lease(tmp_path)
    stale.take()
    ClaimFiles(tmp_path, NAME).path(0).write_text(claims_module.RELEASED)  # as if it were silent
    for _ in range(2):
        take(tmp_path)
        with pytest.raises(Superseded):
            stale.check()
    stale.release()
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.claim-2"]


def test_who_hangs_behind_the_loss_is_ended(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(module, "GRACE", 0.05)
    monkeypatch.setattr(module.os, "_exit", ended.append)
    with lease(tmp_path):
        time.sleep(0.1)
        assert not ended
        ClaimFiles(tmp_path, NAME).make(1)
        while not ended:
            time.sleep(0.01)
    assert ended[0] == 75


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        take(tmp_path / "file")


def test_without_locks_a_dead_process_of_this_machine_holds_no_claim(
    tmp_path, monkeypatch, sleeper
):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(claims_module.fcntl, "lockf", refuse)
    path = left_by(tmp_path, 0, pid=sleeper.pid, started=sleeper.started)
    with Claims(tmp_path) as files, files.held(NAME, wait=False) as mine:
        assert not mine
    sleeper.kill()
    with Claims(tmp_path) as files, files.held(NAME, wait=False) as mine:
        assert mine
    assert not path.exists()


# Who takes it.


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_training_of_a_run_is_told_who_is_at_work(tmp_path, sleeper, capsys):
    run = tmp_path / "run"
    run.mkdir()
    left_by(run, pid=sleeper.pid, started=sleeper.started)
    before = everything(run)
    small = ["stage=sr256", "size=16", "low=8", "crop=null", "batch=4", "images=8"]
    assert main(["train", *small, "data.path=none", f"run={run}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"written to by process {sleeper.pid}" in line
    assert everything(run) == before


def test_a_second_measuring_of_a_point_is_told_who_is_at_work(tmp_path, sleeper):
    point = tmp_path / "point"
    point.mkdir()
    left_by(point, pid=sleeper.pid, started=sleeper.started)
    asked = {"model": str(point), "data": "none", "judge": "none", "point": {}, "seed": 0}
    asked |= {"choices": {}, "trained": None, "split": "val", "count": 1}
    OmegaConf.save(OmegaConf.create(asked), tmp_path / "asked.yaml")
    with pytest.raises(UserError, match=f"written to by process {sleeper.pid}"):
        measure_point(tmp_path / "asked.yaml")


def test_all_ranks_end_at_one_step_when_the_first_has_lost_the_lease(tmp_path, monkeypatch):
    """Without a further collective: the note that they share between steps has a place for it."""
    shared = torch.zeros(5)
    reductions = []

    def reduce(notes, op):
        reductions.append(notes)
        notes.copy_(torch.maximum(notes, shared.to(notes)))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    module = SimpleNamespace(batch=4, device=torch.device("cpu"))
    held = Lease(tmp_path)
    callback = Interruption(
        tmp_path, Checkpoints(tmp_path, EMA(), Position(0, batch=4), total=40), held
    )
    trainer = SimpleNamespace(global_step=0, world_size=2, is_global_zero=True)
    callback.on_train_start(trainer, module)
    for step in (1, 2):
        held.lost, trainer.global_step = step == 2, step
        shared[1:3] = torch.tensor([4.0 * step, -4.0 * step])
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert len(reductions) == 3
    assert reductions[-1][4] == 1  # which is what the other rank gets
    trainer.global_step = 3
    with pytest.raises(Superseded):
        callback.on_train_batch_end(trainer, module, None, None, 0)
