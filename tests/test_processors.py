"""Threads suit what a process was given, and how they wait changes no bit of a training."""

import json
import math
import os
import subprocess
import sys

import pytest

from cascade.eval.benchmarks import busy
from cascade.files import processors
from cascade.slurm.local import Local
from cascade.slurm.plan import TaskGroup, launch
from cascade.slurm.queue import outside_jobs
from tests.launching import tasks
from tests.test_launch import stand_in


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight processors, and no limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})
    monkeypatch.setattr(processors, "quota", lambda: math.inf)


def test_the_least_that_anyone_allows_is_the_number_of_threads(monkeypatch):
    assert processors.settings({}) == {}  # OpenMP counts the mask by itself
    for given, count in (
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "6"}, 3),
        ({"SLURM_CPUS_ON_NODE": "6"}, 6),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_NTASKS_PER_NODE": "2"}, 3),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 1),
    ):
        assert processors.settings(given) == {"OMP_NUM_THREADS": str(count)}
    assert processors.settings({"SLURM_CPUS_PER_TASK": "64"}) == {}
    monkeypatch.setattr(processors, "quota", lambda: 2.5)
    assert processors.available({}) == 2.5
    assert processors.settings({"SLURM_CPUS_PER_TASK": "3"})["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(processors, "quota", lambda: 0.5)
    assert processors.settings({})["OMP_NUM_THREADS"] == "1"


def test_what_the_user_chose_stays(monkeypatch):
    monkeypatch.setattr(processors, "quota", lambda: 2.0)
    assert processors.settings({"OMP_NUM_THREADS": "5"}) == {}
    assert processors.shared({"OMP_NUM_THREADS": "5"}, 2) == {}


def test_a_job_elsewhere_does_not_inherit_what_this_process_chose(monkeypatch):
    monkeypatch.setattr(processors, "quota", lambda: 2.0)  # of a login node
    for given in ({}, {"OMP_NUM_THREADS": "5"}, {"OMP_WAIT_POLICY": "active"}):
        assert processors.without({**given, **processors.settings(given)}) == given
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in processors.settings(os.environ).items():
        monkeypatch.setenv(name, value)
    assert "OMP_NUM_THREADS" not in outside_jobs()


def test_the_quota_of_a_cgroup_is_read_in_both_versions(tmp_path):
    for text, cpus in (("150000 100000\n", 1.5), ("max 100000\n", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert processors.limit(tmp_path) == cpus
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert processors.limit(tmp_path) == 2


@pytest.mark.parametrize(
    ("given", "each"),
    [({}, "2"), ({"OMP_NUM_THREADS": "7"}, "7"), ({"SLURM_CPUS_PER_TASK": "4"}, "1")],
)
def test_processes_of_this_machine_share_its_processors(given, each, tmp_path, monkeypatch):
    """Also where the command that starts them has chosen a number for itself."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, **processors.settings(given)}.items():
        monkeypatch.setenv(name, value)
    python = stand_in(tmp_path / "bin", 'echo "$OMP_NUM_THREADS" >>../said')
    launch(Local(3, 0, python), tmp_path, [TaskGroup("sweep", tasks(tmp_path, "a", "b", "c"))])
    assert (tmp_path / "said").read_text() == 3 * f"{each}\n"


def test_a_task_of_slurm_is_told_before_torch_is_imported(tmp_path):
    """`python -m cascade` as the batch script starts it, with a verb that says what it sees."""
    say = (
        "import json, os, sys\nfrom cascade import cli\n"
        "os.sched_getaffinity = lambda _: {*range(8)}\n"
        "def said(args):\n"
        "    print(json.dumps([os.environ.get('OMP_NUM_THREADS'), 'torch' in sys.modules]))\n"
        "cli.importlib.import_module = lambda _: type('verb', (), {'main': said})\n"
        "cli.main(['runs'])\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "SLURM_"))}
    env |= {"SLURM_CPUS_ON_NODE": "1"}
    done = subprocess.run([sys.executable, "-c", say], env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == ["1", False], done.stderr


def test_the_benchmark_shows_shares_of_the_rate_alone():
    rates = {"alone": 100, "beside a busy process": 45, "beside one niced by 15": 80}
    found = {(where, "now"): [busy.Trial(r, 0.5)] * 3 for where, r in rates.items()}
    columns = [list(column.cells) for column in busy.table(found).columns]
    assert columns[1:] == [["100.0 (1.00)", "45.0 (0.45)", "80.0 (0.80)"], ["", "0.4", "0.7"]]


TRAIN = """
import hashlib, sys
import torch
from cascade.config.compose import built
from cascade.eval.benchmarks import busy, gpu
from cascade.training.rehearsal import batches, rehearsed
from cascade.training.threads import apart
config, _ = rehearsed(busy.TRAINING)
torch.manual_seed(0)
module = built(config.stage)
step = gpu.training(module, batches(config, module)(4))
with apart():
    for _ in range(3):
        step()
assert torch.get_num_threads() == 2
state = b"".join(t.numpy().tobytes() for t in module.state_dict().values())
print(hashlib.sha256(state).hexdigest())
"""


@pytest.mark.slow
def test_how_threads_wait_and_where_they_run_changes_no_bit_of_a_training():
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    runs = [
        subprocess.run([sys.executable, "-c", TRAIN], env=env | way, capture_output=True, text=True)
        for way in busy.WAYS.values()
        if way[processors.COUNT] == "2"
    ]
    assert {run.stdout for run in runs} == {runs[0].stdout} != {""}, runs[0].stderr
