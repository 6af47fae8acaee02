"""Threads of a training stay apart on their processors, and nobody else has to."""

import json
import os
from pathlib import Path

import pytest
import torch

from cascade.training import threads

WHOLE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(WHOLE) < 2, reason="there is one processor, or no mask")


def masks():
    """The processors of each thread of this process."""
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return {task: sorted(os.sched_getaffinity(task)) for task in tasks}


@pytest.fixture(autouse=True)
def one_for_each_processor():
    before = torch.get_num_threads()
    torch.set_num_threads(len(WHOLE))
    yield
    torch.set_num_threads(before)


def in_a_fork():
    """The processors of a process that is forked now."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, str(sorted(os.sched_getaffinity(0))).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        return json.loads(pipe.read())


def test_each_thread_has_a_processor_of_its_own_meanwhile():
    with threads.apart({}):
        alone = [mask for mask in masks().values() if len(mask) == 1]
        assert sorted(alone) == [[processor] for processor in WHOLE]
        assert len(os.sched_getaffinity(0)) == 1
        torch.ones(2**20).exp_()  # the threads of the same pool: no new ones
        assert [mask for mask in masks().values() if len(mask) == 1] == alone
        assert in_a_fork() == WHOLE
    assert {*map(tuple, masks().values())} == {tuple(WHOLE)}


@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"])
def test_threads_run_where_the_user_says(name):
    with threads.apart({name: "false"}):
        assert {*map(tuple, masks().values())} == {tuple(WHOLE)}


def test_fewer_threads_than_processors_run_anywhere():
    torch.set_num_threads(1)
    with threads.apart({}):
        assert {*map(tuple, masks().values())} == {tuple(WHOLE)}


def test_threads_may_run_anywhere_again_after_an_error():
    with pytest.raises(KeyError), threads.apart({}):
        raise KeyError
    assert {*map(tuple, masks().values())} == {tuple(WHOLE)}
