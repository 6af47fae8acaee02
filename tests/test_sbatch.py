"""What sbatch is told: the environment overrules nothing, limits are possible, names survive."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.cli import main
from cascade.errors import UserError
from cascade.slurm import limits, queue
from cascade.slurm.code import copied, digest_of
from cascade.slurm.local import Local
from cascade.slurm.plan import Task, TaskGroup, launch
from tests.launching import FINISHES, in_queue, launcher, program, tasks


def slurm(*overrides):
    return launcher("launcher=slurm", "launcher.gpus=0", *overrides)


@pytest.fixture
def sent(programs, monkeypatch):
    """Lets sbatch note its arguments and its environment, one file for each job."""
    for key in os.environ:
        if key.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE")):
            monkeypatch.delenv(key)
    note = f'n=$(ls {programs}/job-* 2>/dev/null | wc -l); printf "%s\\0" "$@" > {programs}/job-$n'
    program(programs, "sbatch", f"{note}\nenv -0 > {programs}/env-$n\necho $((n + 101))")

    def read(number):
        arguments = (programs / f"job-{number}").read_text().split("\0")[:-1]
        pairs = (programs / f"env-{number}").read_text().split("\0")[:-1]
        options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
        return options, dict(pair.partition("=")[::2] for pair in pairs)

    read.answers = lambda text: program(programs, "scontrol", text)
    read.count = lambda: len([*programs.glob("job-*")])
    return read


# The environment


def test_what_the_launcher_says_overrules_the_environment(sent, tmp_path, monkeypatch, capsys):
    mine = {"SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1"}
    mine |= {"SBATCH_GPUS_PER_TASK": "8", "SBATCH_MEM_PER_CPU": "9", "SBATCH_WAIT": "1"}
    for key, value in {**mine, "SBATCH_QOS": "low", "SBATCH_RESERVATION": "x"}.items():
        monkeypatch.setenv(key, value)
    asked = ["launcher.partition=gpu", "launcher.time=60", "launcher.options=['--mem=1']"]
    launch(slurm(*asked), tmp_path, [TaskGroup("train", tasks(tmp_path, "a"))])
    options, env = sent(0)
    assert (options["partition"], options["time"], options["mem"]) == ("gpu", "60", "1")
    assert "requeue" in options
    assert not mine.keys() & env.keys()
    assert env["SBATCH_QOS"] == "low"  # which the launcher leaves to the user
    line = next(l for l in capsys.readouterr().out.splitlines() if "not passed on" in l)
    assert all(f"{key}={value}" in line for key, value in mine.items())
    assert "QOS" not in line


def test_a_job_that_sends_another_does_not_describe_itself(sent, tmp_path, monkeypatch, capsys):
    outer = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "4"}
    outer |= {"SLURM_EXPORT_ENV": "PATH", "SRUN_CPUS_PER_TASK": "64", "SQUEUE_STATES": "RUNNING"}
    for key, value in {**outer, "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(key, value)
    launch(slurm(), tmp_path / "there", [TaskGroup("train", tasks(tmp_path / "there", "a"))])
    assert not outer.keys() & sent(0)[1].keys()
    assert sent(0)[1]["SLURM_CONF"] == "/etc/slurm.conf"
    assert "of job 7" in capsys.readouterr().out
    python = program(tmp_path, "python", f"{FINISHES}\nenv > {tmp_path}/env-here")
    launch(Local(1, 0, str(python)), tmp_path / "here", [TaskGroup("train", tasks(tmp_path, "b"))])
    here = (tmp_path / "env-here").read_text()
    assert not any(f"{key}=" in here for key in outer)


def test_a_task_runs_what_was_frozen_or_nothing(tmp_path, capsys):
    assert main(["--code", "0123456789ab", "runs", str(tmp_path)]) == 2
    assert "not what was frozen" in capsys.readouterr().err
    copy = copied(tmp_path)
    assert main(["--code", digest_of(copy), "runs", str(tmp_path)]) == 0  # equal code is the same
    edited = copied(tmp_path) / "cascade" / "verbs" / "runs.py"
    edited.write_text(edited.read_text() + "\n")
    command = [sys.executable, "-m", "cascade", "--code", digest_of(copy), "runs", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(copy) in done.stderr


# Limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 5400),
        ("90", 5400),
        ("7:30", 450),
        ("08:00:00", 28800),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-02:30:15", 95415),
        ("UNLIMITED", None),
        (0, None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert limits.seconds(text) == seconds


def test_a_limit_that_leaves_no_time_to_train_is_refused(sent, tmp_path, monkeypatch):
    links = [TaskGroup("train", tasks(tmp_path, "a"))]
    for time in ("5", "'06:59'", "'0-00:06'"):
        with pytest.raises(UserError, match=r"too short.*launcher.time=7"):
            slurm(f"launcher.time={time}")
    with pytest.raises(UserError, match="is not a time limit"):
        slurm("launcher.time='5 hours'")
    slurm("launcher.time=7")
    slurm("launcher.time=3", "launcher.signal_seconds=60")
    with pytest.raises(UserError, match=r"launcher.time=5 is too short"):
        slurm().ranks({"time": 5})
    with pytest.raises(UserError, match="train: the time limit 0:30 is"):
        launch(slurm("launcher.options=['--time=0:30']"), tmp_path, links)
    monkeypatch.setenv("SBATCH_TIMELIMIT", "4")
    with pytest.raises(UserError, match="the time limit 4 is"):
        launch(slurm(), tmp_path, links)
    monkeypatch.delenv("SBATCH_TIMELIMIT")
    show = "PartitionName=%s Default=%s DefaultTime=%s MaxTime=%s\\n"
    rows = "a YES NONE UNLIMITED  b NO 00:05:00 UNLIMITED  c NO NONE 00:06:00"
    sent.answers(f'[ "$2" = config ] || printf "{show}" {rows}')
    for partition in ("b", "'a,b'", "c"):
        with pytest.raises(UserError, match=r"the default limit 00:0\d:00 of partition"):
            launch(slurm(f"launcher.partition={partition}"), tmp_path, links)
    assert sent.count() == 0
    launch(slurm(), tmp_path, links)
    assert sent.count() == 1


def test_what_is_more_than_an_array_is_several(sent, tmp_path):
    sent.answers('[ "$2" != config ] || echo "MaxArraySize            = 3"')

    def links():
        trained = tasks(tmp_path, *"abcdefg")
        cells = [Task(task.folder / "cells", ["cells"]) for task in trained]
        report = TaskGroup("report", tasks(tmp_path, "report"), ["cells"])
        return [TaskGroup("sweep", trained), TaskGroup("cells", cells, each_after="sweep"), report]

    launch(slurm(), tmp_path, links())
    jobs = [sent(i)[0] for i in range(7)]
    assert [job["array"] for job in jobs] == ["0-2", "0-2", "0-0"] * 2 + ["0-0"]
    waits = [f"aftercorr:{101 + i}" for i in range(3)] + ["afterok:104:105:106"]
    assert [job.get("dependency") for job in jobs] == [None] * 3 + waits
    records = [job["comment"].removeprefix(queue.COMMENT) for job in jobs[:3]]
    listed = [[t["folder"][-1] for t in json.loads(Path(r).read_text())["tasks"]] for r in records]
    assert listed == [[*"abc"], [*"def"], ["g"]]
    rows = [(f"{101 + i}_0", "PENDING", 0, "Priority", r, 0) for i, r in enumerate(records)]
    in_queue(tmp_path / "bin", *rows)
    assert sorted(queue.jobs()) == [tmp_path / name for name in "adg"]
    launch(
        slurm("launcher.at_once=2"), tmp_path / "again", [TaskGroup("x", tasks(tmp_path, *"1234"))]
    )
    assert sent(7)[0]["array"] == "0-2%2"
    assert sent(8)[0]["dependency"] == "afterany:108"  # no more than two at a time, of all


def test_jobs_wait_only_for_jobs_that_slurm_knows(sent, tmp_path):
    """Slurm takes a job that it has forgotten for one that ended well."""

    def links():
        return [
            TaskGroup("clip", tasks(tmp_path, "clip")),
            TaskGroup("prior", tasks(tmp_path, "p"), ["clip"]),
        ]

    launch(slurm(), tmp_path, links())
    assert sent(1)[0]["dependency"] == "afterok:101"
    launch(slurm(), tmp_path, links())  # both were forgotten, and nothing of them is there
    assert sent(3)[0]["dependency"] == "afterok:103"
    record = sent(2)[0]["comment"].removeprefix(queue.COMMENT)
    in_queue(tmp_path / "bin", ("103_0", "RUNNING", 0, "None", record, 0))
    launch(slurm(), tmp_path, links())
    assert sent(4)[0]["dependency"] == "afterok:103_0"


# Names


@pytest.mark.parametrize("name", ["a%jb", "a b", "it's", 'a"b', "a,b=c", "a[1]", "a#b", "a$HOME"])
def test_a_folder_of_any_name_is_sent(name, sent, tmp_path):
    root = tmp_path / name
    launch(slurm(), root, [TaskGroup("train", tasks(root, "a"))])
    options, script = sent(0)[0], (root / "launch/1/train/script.sh").read_text()
    assert options["output"].replace("%a", "0").replace("%%", "%") == f"{root}/launch/1/train/0.txt"
    assert f"0) folder={shlex.quote(str(root / 'a'))} command=" in script


@pytest.mark.parametrize("name", ["a\\b", "a\nb"])
def test_what_slurm_loses_in_names_is_refused(name, sent, tmp_path):
    with pytest.raises(UserError, match="Slurm drops"):
        launch(slurm(), tmp_path / name, [TaskGroup("train", tasks(tmp_path, "a"))])
    assert sent.count() == 0
