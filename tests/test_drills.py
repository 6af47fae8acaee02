"""Every fault in a real run, on one and two ranks: how it ends, and that the same command goes on.

Each drill starts `cascade train` with a fault, checks the exit codes and the timeline, and starts
the same again until it is finished. Its weights are then those of a run without the fault, bit for
bit: no sample was lost, and none was seen twice. The last lines of the output are the table.
"""

import json
import os
import shutil
import signal
import tarfile
import time
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from cascade.data.scenes.generate import write_scenes
from cascade.files.lease import NAME
from cascade.files.locks import RELEASED, ClaimFiles
from tests import small
from tests.processes import Job, cascade_in_group

pytestmark = pytest.mark.slow

STEPS, BATCH = 8, 4
SMALL = [*small.SR, f"batch={BATCH}", f"images={STEPS * BATCH}", "ema=0.9", "save_seconds=0.0"]
KILLED = -signal.SIGKILL


class Drill(NamedTuple):
    """A fault and how the first start ends.

    Args:
        fault: choices of `faults`, each with its options.
        one, two: exit codes on one rank and on two; None: not on so many.
        event: what the timeline names.
        lost: samples passed over, each of them named; the run is then not that without the fault.
        more: further overrides.
    """

    fault: str
    one: list[int] | None
    two: list[int] | None
    event: str
    lost: int = 0
    more: tuple[str, ...] = ()


HUNG = ("watchdog=4.0",)  # long enough for a slow step on a busy machine
DRILLS = {
    "loss is not a number, rank 0": Drill("not_a_number", [0], [0, 0], "skipped step", BATCH),
    "loss is not a number, rank 1": Drill(
        "not_a_number rank=1", None, [0, 0], "skipped step", BATCH
    ),
    "gradient is infinite, rank 0": Drill("gradient", [0], [0, 0], "skipped step", BATCH),
    "gradient is infinite, rank 1": Drill("gradient rank=1", None, [0, 0], "skipped step", BATCH),
    "not a number, 4 steps in a row": Drill(
        "not_a_number times=4", [1], [1, 1], "skipped step", 3 * BATCH
    ),
    "kill -9, rank 0": Drill("kill", [KILLED], [KILLED, 1], "resumed"),
    "kill -9, rank 1": Drill("kill rank=1", None, [1, KILLED], "resumed"),
    "kill -9, all": Drill("kill rank=null", None, [KILLED, KILLED], "resumed"),
    "kill -9 before the first checkpoint": Drill("kill step=0", [KILLED], [KILLED, 1], "started"),
    "kill -9 while saving": Drill("killed_save", [KILLED], [KILLED, 1], "resumed"),
    "an error, rank 0": Drill("crash", [1], [1, 1], "resumed"),
    "an error, rank 1": Drill("crash rank=1", None, [1, 1], "resumed"),
    "hang, rank 0": Drill("hang", [75], [75, 75], "hung", more=HUNG),
    "hang, rank 1": Drill("hang rank=1", None, [75, 75], "hung", more=HUNG),
    "stopped (SIGSTOP), rank 1": Drill(
        "kill rank=1 name=SIGSTOP", None, [75, KILLED], "hung", more=HUNG
    ),
    "slow, rank 0": Drill("hang seconds=1.0", [0], [0, 0], "finished", more=HUNG),
    "SIGTERM, rank 0": Drill("sigterm", [75], [75, 75], "interrupted"),
    "SIGTERM, rank 1": Drill("sigterm rank=1", None, [75, 75], "interrupted"),
    "SIGTERM, all": Drill("sigterm rank=null", None, [75, 75], "interrupted"),
    "SIGUSR1, all": Drill("sigusr1", [75], [75, 75], "interrupted"),
    "SIGUSR2, rank 1": Drill("sigusr1 rank=1 name=SIGUSR2", None, [75, 75], "interrupted"),
    "Ctrl-C, all": Drill("sigterm rank=null name=SIGINT", [130], [130, 130], "resumed"),
    "Ctrl-C, rank 1": Drill("sigterm rank=1 name=SIGINT", None, [1, 130], "resumed"),
    "SIGTERM and SIGUSR1": Drill("sigterm, sigusr1", [75], [75, 75], "interrupted"),
    "data worker killed": Drill("dead_worker", [1], [1, 1], "resumed", more=("workers=1",)),
    "disk full": Drill("full_disk", [1], [1, 1], "resumed"),
    "a byte of the newest checkpoint flipped": Drill(
        "flipped_byte, kill", [KILLED], [KILLED, 1], "set aside"
    ),
}
CASES = [
    (name, ranks)
    for name, drill in DRILLS.items()
    for ranks, codes in ((1, drill.one), (2, drill.two))
    if codes
]


def faulty(fault):
    """Overrides: "kill rank=1, crash" strikes in step 4, unless it says otherwise."""
    parts = [part.split() for part in fault.split(", ")]
    options = [f"faults.{name}.{o}" for name, *given in parts for o in ("step=4", *given)]
    return [f"faults=[{','.join(name for name, *_ in parts)}]", *options]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 30, 32, seed=0, shard_size=10)
    return folder


@pytest.fixture
def start(shards, tmp_path):
    """Starts a run on so many ranks; none of them outlives the test."""
    jobs = []

    def begin(run, ranks, *overrides):
        argv = ["train", *SMALL, f"data.path={shards}", f"run={run}"]
        argv += [f"trainer.devices={ranks}", *overrides]
        jobs.append(Job(cascade_in_group, (argv,), out=tmp_path / f"out{len(jobs)}", ranks=ranks))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.fixture
def table(record_property):
    """Notes a row of the table that ends the report."""
    return lambda *row: record_property("drill", row)


@pytest.fixture(scope="module")
def clean(shards, tmp_path_factory):
    """Weights without a fault, by ranks."""
    folder, jobs = tmp_path_factory.mktemp("clean"), {}
    for ranks in (1, 2):
        argv = ["train", *SMALL, f"data.path={shards}", f"run={folder / str(ranks)}"]
        argv += [f"trainer.devices={ranks}"]
        jobs[ranks] = Job(cascade_in_group, (argv,), out=folder / f"out{ranks}", ranks=ranks)
    for ranks, job in jobs.items():
        assert job.wait() == ranks * [0], job.output()
    return {ranks: weights(folder / str(ranks)) for ranks in jobs}


def weights(run):
    return load_file(run / "weights.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def timeline(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def position(run):
    path = sorted((run / "checkpoints").glob("step-*"))[-1]
    return json.loads((path / "manifest.json").read_text())


def codes_of(job, fault):
    """Exit codes; a rank that is stopped is killed once the other is gone, as srun does."""
    if "SIGSTOP" in fault:
        job.processes[0].join(60)
        job.kill()
    return job.wait()


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_a_run_with_a_fault_ends_as_it_should_and_goes_on(
    name, ranks, start, clean, table, tmp_path
):
    drill, run = DRILLS[name], tmp_path / "run"
    overrides = [*faulty(drill.fault), *drill.more]
    expected = drill.one if ranks == 1 else drill.two
    first = start(run, ranks, *overrides)
    codes = codes_of(first, drill.fault)
    assert codes == expected, first.output()
    if any(codes):
        again = start(run, ranks, *overrides)
        assert again.wait() == ranks * [0], again.output()
    at, kinds = position(run), [line["event"] for line in timeline(run)]
    assert drill.event in kinds
    assert kinds[-1] == "finished"
    assert (at["images"], at["consumed"]) == (STEPS * BATCH, STEPS * BATCH)
    assert equal(weights(run), clean[ranks]) == (drill.lost == 0)
    assert lost(run) == drill.lost
    table(*row(name, codes, run))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_leaves_those_that_read_data_alone(
    name, start, clean, table, tmp_path
):
    """As Slurm sends it."""
    run, overrides = tmp_path / "run", [*faulty("hang seconds=2.0"), "workers=1"]
    first = start(run, 2, *overrides)
    wait_for(run / "drill" / "Hang-4-rank0", first)
    for process in first.processes:
        os.killpg(process.pid, getattr(signal, name))
    codes = first.wait()
    assert codes == [75, 75], first.output()
    assert start(run, 2, *overrides).wait() == [0, 0]
    assert equal(weights(run), clean[2])
    table(*row(f"{name}, all ranks and data workers", codes, run))


def test_two_ranks_end_together_when_another_process_takes_their_run(start, clean, table, tmp_path):
    run, overrides = tmp_path / "run", faulty("hang seconds=2.0")
    first, claims = start(run, 2, *overrides), ClaimFiles(run, NAME)
    wait_for(run / "drill" / "Hang-4-rank0", first)
    claims.make(1)
    before = position(run)
    codes = first.wait()
    assert codes == [75, 75], first.output()
    assert "taken over by process" in first.output(0)
    assert position(run) == before
    claims.path(1).write_text(RELEASED)
    again = start(run, 2, *overrides)
    assert again.wait() == [0, 0], again.output()
    assert equal(weights(run), clean[2])
    table(*row("taken over by another process", codes, run))


def absent(argv):
    """`cascade ARGV`, of which rank 1 dies before the ranks have found each other."""
    return 1 if os.environ["RANK"] == "1" else cascade_in_group(argv)


def test_a_rank_does_not_wait_for_one_that_never_came(shards, tmp_path, table):
    run = tmp_path / "run"
    argv = ["train", *SMALL, f"data.path={shards}", f"run={run}", "trainer.devices=2"]
    job = Job(absent, ([*argv, "watchdog=2.0"],), out=tmp_path / "out", ranks=2)
    codes = job.wait()
    assert codes == [75, 1], job.output()
    (hung,) = timeline(run)
    assert (hung["event"], hung["phase"]) == ("hung", "start")
    table(*("a rank dies before the others found it", 2, "75 1", "hung", 0))


def test_two_ranks_go_back_behind_a_jump_of_the_loss(start, table, tmp_path):
    """Guard looks at 200 steps before it calls anything a jump."""
    run, overrides = tmp_path / "run", [*faulty("jump step=205"), "spike=1000.0", "images=840"]
    job = start(run, 2, *overrides, "save_seconds=0.5")
    assert job.wait() == [0, 0], job.output()
    events = timeline(run)
    (jump,) = (line for line in events if line["event"] == "rollback")
    (back,) = (
        line for line in events if line["event"] in ("started", "resumed") and line["offset"]
    )
    assert jump["step"] == 205
    assert back["consumed"] == jump["consumed"] == BATCH * 206
    assert position(run)["offset"] == lost(run) == BATCH * (206 - back["step"])
    table(*row("the loss jumps", [0, 0], run))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("allowed", ["0.01", "0.0"])
def test_bad_pictures_are_replaced_up_to_a_limit(allowed, ranks, start, shards, table, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(shards, bad)
    damage(bad / "train-00001.tar", 3)
    run, share = tmp_path / "run", f"+data.max_skip_fraction={allowed}"
    job = start(run, ranks, f"data.path={bad}", share, "images=200", "save_seconds=60.0")
    codes = job.wait()
    assert codes == ranks * [0 if allowed == "0.01" else 2], job.output()
    names = {json.loads(line)["key"] for line in (run / "skipped.jsonl").read_text().splitlines()}
    assert len(names) == 1
    what = "over" if codes[0] else "under"
    table(*row(f"a bad picture, {what} the limit", codes, run))


def damage(tar, place):
    """Bad bytes in the middle of a picture."""
    with tarfile.open(tar) as file:
        pictures = [m for m in file.getmembers() if m.name.endswith((".png", ".jpg", ".webp"))]
    with tar.open("r+b") as file:
        file.seek(pictures[place].offset_data + 40)
        file.write(bytes(pictures[place].size - 40))


def wait_for(path, job):
    while not path.exists():
        time.sleep(0.01)
        assert all(process.is_alive() for process in job.processes), job.output()


def row(name, codes, run):
    """Of the table; the timeline without checkpoints, and nothing twice in a row."""
    kinds = [line["event"] for line in timeline(run) if line["event"] != "checkpoint"]
    kinds = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    return name, len(codes), " ".join(map(str, codes)), ", ".join(kinds), lost(run)


def lost(run):
    """Samples that no step was taken with: those of skipped steps that were not repeated."""
    events, skipped = timeline(run), {}
    for line in events:
        if line["event"] == "skipped step":
            skipped[line["step"]] = line["samples"]
        if line["event"] in ("resumed", "started"):
            skipped = {s: n for s, n in skipped.items() if s < line["step"]}
    return sum(skipped.values()) + position(run)["offset"]
