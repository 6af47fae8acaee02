"""Runs on a real Slurm, which lives as long as these tests: `make test-slow`.

Where what is tested is the batch script, a stand-in takes python's place; one run is real.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.runs.done import finished
from cascade.slurm import queue, state
from cascade.slurm.code import copied
from cascade.slurm.plan import Task, TaskGroup, launch
from cascade.training import fit
from tests.cluster import Cluster, free_ports, missing
from tests.launching import FINISHES
from tests.processes import Job

pytestmark = pytest.mark.slow

TINY = ["stage=sr256", "size=16", "low=8", "crop=null", "batch=4", "warmup=8", "grids=0"]
TINY += ["net.net.channels=8", "net.net.patch=2", "net.net.embed=16", "ema=0.9"]
TINY += ["net.net.multipliers=[1]", "net.net.blocks=1"]
TINY += ["learning_rate=constant", "save_seconds=1.0"]
SWEEP = f"# @package _global_\nname: one\nbase: {json.dumps(TINY)}\n"
SWEEP += "train: sr\naxes: {a: {b: []}}\n"


@pytest.fixture(scope="module")
def cluster():
    if absent := missing():
        pytest.skip(f"Slurm is not on this machine: it lacks {', '.join(absent)}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    one = Cluster(folder)
    try:
        one.start()
        with pytest.MonkeyPatch.context() as patch:
            for key in ("PATH", "SLURM_CONF"):
                patch.setenv(key, one.env[key])
            yield one
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


def ended(cluster):
    cluster.hurry()
    return not queue.jobs()


def slurm(python, *overrides):
    own = ["launcher=slurm", "launcher.gpus=0", f"launcher.python={python}", *overrides]
    return built(composed("launcher", own).launcher)


def stand_in(folder, text):
    """A python that does what `text` says in the folder of the task, and counts its attempts."""
    path = folder / "python"
    path.write_text(
        f'#!/usr/bin/env bash\ncd "$CASCADE_FOLDER"\n{FINISHES}\necho >> attempts\n{text}\n'
    )
    path.chmod(0o755)
    return path


def attempts(folder):
    path = folder / "attempts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_tasks_of_an_array_requeue_themselves_alone_and_not_without_end(cluster, tmp_path):
    text = """
        n=$(wc -l < attempts)
        case $PWD in
        */well) exit 0 ;;
        */again) [ $n -gt 1 ] || exit 75 ;;
        */killed) [ $n -gt 1 ] || kill -9 $$ ;;
        */capped) exit 75 ;;
        */refused) echo no such file > "$CASCADE_FAILURE"; exit 2 ;;
        esac"""
    root = tmp_path / "a b"
    root.mkdir()
    names = ("well", "again", "killed", "capped", "refused")
    tasks = [Task(root / name, ["train"]) for name in names]
    one = slurm(stand_in(root, text), "launcher.max_restarts=2")
    launch(one, root, [TaskGroup("sweep", tasks)])
    cluster.wait(lambda: ended(cluster), "the array")
    assert [attempts(root / name) for name in names] == [1, 2, 2, 3, 1]
    words = {name: state.state(root / name, None) for name in names}
    assert [words[name].word for name in names] == ["finished"] * 3 + ["failed"] * 2
    assert words["refused"].note == "no such file"
    assert "no newer checkpoint in 3 attempts" in words["capped"].note


def test_a_failed_link_stops_what_hangs_on_it_and_is_mended_by_sending_again(cluster, tmp_path):
    def links():
        after = {"clip": [], "bad": ["clip"], "good": ["clip"], "more": ["good"]}
        after["report"] = ["bad", "more"]
        return [
            TaskGroup(name, [Task(folder, ["train"], done=finished(folder))], before)
            for name, before in after.items()
            for folder in [tmp_path / name]
        ]

    def counts():
        return [attempts(tmp_path / link.name) for link in links()]

    text = """
        case $PWD in
        */bad) [ -e ../mended ] || exit 1 ;;
        */good) [ $(wc -l < attempts) -gt 1 ] || exit 75 ;;  # which is no failure
        esac"""
    python = stand_in(tmp_path, text)
    launch(slurm(python), tmp_path, links())
    assert state.state(tmp_path / "report", queue.jobs()[tmp_path / "report"]).word == "queued"
    cluster.wait(lambda: ended(cluster), "the chain")
    assert counts() == [1, 1, 2, 1, 0]
    assert state.state(tmp_path / "bad", None).word == "failed"
    (tmp_path / "mended").touch()
    launch(slurm(python), tmp_path, links())
    cluster.wait(lambda: ended(cluster), "the chain, again")
    assert counts() == [1, 2, 2, 1, 1]
    assert {state.state(link.tasks[0].folder, None).word for link in links()} == {"finished"}


def test_each_goes_on_without_those_beside_it_and_what_failed_is_mended(cluster, tmp_path):
    trained, measured = ([tmp_path / name / of for name in "abc"] for of in ("", "cells"))
    report = tmp_path / "report"

    def of(folders):
        return [Task(folder, ["train"], done=finished(folder)) for folder in folders]

    def links():
        pairs = [
            TaskGroup("sweep", of(trained)),
            TaskGroup("cells", of(measured), each_after="sweep"),
        ]
        return [*pairs, TaskGroup("report", of([report]), after=["cells"])]

    def counts():
        return [[attempts(f) for f in folders] for folders in (trained, measured, [report])]

    text = """
        case $PWD in
        */b) [ -e ../mended ] || exit 1 ;;
        */c) [ $(wc -l < attempts) -gt 1 ] || exit 75 ;;
        esac"""
    python = stand_in(tmp_path, text)
    launch(slurm(python), tmp_path, links())
    cluster.wait(lambda: ended(cluster), "the pairs")
    assert counts() == [[1, 1, 2], [1, 0, 1], [0]]
    (tmp_path / "mended").touch()
    launch(slurm(python), tmp_path, links())
    cluster.wait(lambda: ended(cluster), "the pairs, again")
    assert counts() == [[1, 2, 2], [1, 1, 1], [1]]


def test_the_environment_changes_neither_what_is_asked_nor_the_code(cluster, tmp_path, monkeypatch):
    """As from within a job, of other memory, with an eye on some jobs and variables alone."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "cascade").mkdir(parents=True)
    (elsewhere / "cascade" / "__main__.py").write_text("raise SystemExit('not what was frozen')")
    variables = {"SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1"}
    variables |= {"SBATCH_EXPORT": "PATH,HOME", "SLURM_EXPORT_ENV": "PATH,HOME"}
    variables |= {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "1", "SLURM_NTASKS": "4"}
    variables |= {"SQUEUE_STATES": "SUSPENDED", "SLURM_CPUS_PER_TASK": "64"}
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(elsewhere)
    text = 'echo "$PYTHONPATH" "$@" > told; scontrol show job "$SLURM_JOB_ID" > shown'
    asked = ["launcher.partition=high", "launcher.time=60", "launcher.options=['--mem=1']"]
    root = tmp_path / "run"
    launch(
        slurm(stand_in(tmp_path, text), *asked), root, [TaskGroup("train", [Task(root, ["train"])])]
    )
    cluster.wait(lambda: ended(cluster), "the job")
    code, *command = (root / "told").read_text().split()
    assert code == str(copied(root / "launch"))
    assert command == ["-m", "cascade", "--code", code[-12:], "train"]
    shown = (root / "shown").read_text()
    for word in ("Partition=high", "TimeLimit=01:00:00", "Requeue=1", "NumTasks=1", "CPUs/Task=1"):
        assert word in shown


def test_every_name_is_the_name_of_a_run(cluster, tmp_path):
    names = ["a%jb", "a b", "it's", 'a"b', "a,b=c", "a[1]", "a#b", "a$HOME", "1_000", "é"]
    root = tmp_path / "of %a, $HOME & 'all'"
    launch(
        slurm(stand_in(tmp_path, "exit 0")),
        root,
        [TaskGroup(name, [Task(root / name, ["train"])]) for name in names],
    )
    waiting = queue.jobs()
    assert all(root / name in waiting or attempts(root / name) for name in names)
    cluster.wait(lambda: ended(cluster), "the jobs")
    assert [attempts(root / name) for name in names] == [1] * len(names)
    assert all((root / "launch" / "1" / name / "0.txt").exists() for name in names)


def test_more_tasks_than_an_array_holds_are_several_arrays(cluster, tmp_path):
    """One each: the last waits for all, and each of a pair for its own."""
    trained = [Task(tmp_path / str(i), ["train"]) for i in range(8)]
    cells = [Task(tmp_path / str(i) / "cells", ["cells"]) for i in range(8)]
    report = Task(tmp_path / "report", ["report"])
    text = f"""
        echo "${{PWD#{tmp_path}/}}" >> {tmp_path}/order
        case $PWD in */3) exit 1 ;; esac"""
    links = [TaskGroup("sweep", trained), TaskGroup("cells", cells, each_after="sweep")]
    launch(slurm(stand_in(tmp_path, text)), tmp_path, links)
    cluster.wait(lambda: ended(cluster), "the arrays")
    order = (tmp_path / "order").read_text().split()
    well = [str(i) for i in range(8) if i != 3]
    assert sorted(order) == sorted(["3", *well, *(f"{name}/cells" for name in well)])
    assert all(order.index(name) < order.index(f"{name}/cells") for name in well)
    launch(
        slurm(stand_in(tmp_path, "exit 0"), "launcher.at_once=1"),
        tmp_path,
        [
            TaskGroup("all", [Task(tmp_path / "all" / str(i), ["train"]) for i in range(7)]),
            TaskGroup("report", [report], ["all"]),
        ],
    )
    waiting = [folder for folder, job in queue.jobs().items() if job.state == "PENDING"]
    assert report.folder in waiting
    cluster.wait(lambda: ended(cluster), "the report")
    assert attempts(report.folder) == 1


# A task whose node is lost, and which lives on there.
HOLDER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = os.environ["PYTHONPATH"].split(":")
from cascade.files import locks
from cascade.files.lease import lease
from cascade.runs.done import finish
from cascade.files.atomic import write_atomically
locks.BEAT = 0.2
folder, attempt = Path(os.environ["CASCADE_FOLDER"]), os.environ["CASCADE_ATTEMPT"]
with (folder / "attempts").open("a") as file:
    file.write(attempt + chr(10))
with lease(folder):
    for number in range(20 if attempt != "1" else 6000):
        write_atomically(folder / "output", lambda path: path.write_text(attempt))
        with (folder / "written").open("a") as file:
            file.write(attempt)
        time.sleep(0.02)
finish([folder / "output"])
"""


@pytest.mark.parametrize("reachable", [True, False])
def test_a_lost_node_is_no_success_and_two_attempts_never_write_at_once(
    reachable, cluster, tmp_path
):
    """The node is set down; or it is out of reach as well, and what ran there lives on."""
    script, folder = tmp_path / "python", tmp_path / "task"
    script.write_text(f"#!{sys.executable}\n{HOLDER}")
    script.chmod(0o755)
    launch(slurm(script), tmp_path, [TaskGroup("one", [Task(folder, ["train"])])])
    cluster.wait((folder / "written").exists, "the first attempt")
    node = cluster("squeue", "-h", "-o", "%N").strip()
    daemon = next(one for one in cluster.daemons if one.args[-1] == node)
    try:
        if not reachable:
            daemon.send_signal(signal.SIGSTOP)
        cluster("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        cluster.wait(lambda: queue.jobs()[folder].restarts == 1, "its requeue")
        # A node that answers is back at once here, and still has the job of before.
        job = queue.jobs()[folder].id
        cluster("scontrol", "update", f"JobId={job}", f"ExcNodeList={node}")
        assert not finished(folder)
        cluster.wait(lambda: ended(cluster), "the second attempt")
    finally:
        daemon.send_signal(signal.SIGCONT)
        cluster("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert finished(folder)
    assert (folder / "attempts").read_text().split() == ["1", "2"]
    written = (folder / "written").read_text()
    assert written == "".join(sorted(written))  # none of the first behind one of the second
    assert (folder / "output").read_text() == "2"


def events(run):
    path = run / "events.jsonl"
    return path.read_text() if path.exists() else ""


def reference(overrides):
    fit.train(composed("train", overrides))


def test_a_run_outlives_a_dead_rank_its_wall_time_a_preemption_and_edits(cluster, tmp_path):
    """Of two ranks with gloo; in the end it equals a run that nothing happened to."""
    shards, root, source = tmp_path / "shards", tmp_path / "sweep", copied(tmp_path)
    write_scenes(shards, "plain", "train", 20, 32, seed=0, shard_size=10)
    (source / "cascade/conf/sweep/one.yaml").write_text(SWEEP)
    run, free = root / "b-s0" / "sr", ["launcher=slurm", "launcher.gpus=0", "launcher.nodes=2"]
    address = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_ports(1)[0]}"  # nodes have no real names
    preamble = f"export {address} OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="
    options = ["launcher.time=60", f"launcher.preamble='{preamble}'"]

    def send(*more):
        command = [sys.executable, "-m", "cascade", "sweep", "sweep=one", *free, *options, *more]
        env = {**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
        subprocess.run([*command, f"run={root}", f"data.path={shards}"], env=env, check=True)

    def job():
        return queue.jobs().get(run)

    def steps():
        return state.state(run, None).images or 0

    def goes_on():
        before = steps()
        cluster.wait(lambda: cluster.hurry() or steps() > before + 80, "training", 240)

    def requeued(times, word):
        cluster.wait(lambda: (j := job()) and j.restarts == times, f"requeue {times}")
        cluster.wait(lambda: job().state == "PENDING", f"the end of attempt {times - 1}")
        assert state.state(run, job()).word == word

    faults = ["faults=kill", "faults.kill.step=20", "faults.kill.rank=1"]
    send("images=10_000_000", *faults, "launcher.options=[--hold]")
    edited = {source / "cascade/conf/train.yaml": "seed: 1", source / "cascade/__main__.py": "1/0"}
    texts = {path: path.read_text() for path in edited}
    for path, text in edited.items():
        path.write_text(texts[path] + "\n" + text + "\n")
    cluster("scontrol", "release", job().id.partition("_")[0])
    requeued(1, "requeued")  # rank 1 was killed
    goes_on()
    assert state.state(run, job()).word == "running"
    cluster("scontrol", "update", f"JobId={job().id}", "TimeLimit=5")
    requeued(2, "requeued")  # told by SIGUSR1
    assert '"SIGUSR1"' in events(run)
    cluster("scontrol", "update", f"JobId={job().id}", "TimeLimit=60")
    goes_on()
    nodes = cluster("squeue", "-h", "-j", job().id, "-o", "%N").strip()
    cluster("sbatch", "-p", "high", f"--nodelist={nodes}", "-o", "/dev/null", "--wrap", "true")
    requeued(3, "preempted")
    assert '"SIGTERM"' in events(run)
    cluster("scancel", job().id)
    cluster.wait(lambda: not job(), "its cancellation")
    for path, text in texts.items():
        path.write_text(text)
    images = f"images={steps() + 80}"
    send(images)
    cluster.wait(lambda: not job(), "the end", 240)
    assert state.state(run, None).word == "finished"
    overrides = [*TINY, images, f"data.path={shards}", f"run={tmp_path / 'whole'}"]
    whole = Job(reference, [[*overrides, "trainer.devices=2"]], out=tmp_path / "out", ranks=2)
    assert whole.wait(120) == [0, 0], whole.output()
    a, b = (load_file(folder / "weights.safetensors") for folder in (run, tmp_path / "whole"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
