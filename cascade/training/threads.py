"""Threads of a training on the CPU, each on a processor of its own.

OpenMP's threads meet at the end of each parallel loop. Beside another busy process, Linux balances
three threads between two processors, so for a third of the time two of the training's threads share
one: neither can arrive while the other waits for it. Threads that stay apart lose a processor's
share to the other process, and no more (`python -m cascade.eval.benchmarks.busy`).
"""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# By which a user, or an MPI, says where OpenMP's threads are to run.
_CHOSEN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_whole: set[int] = set()  # the processors that forked processes may use again; empty: all as it is


@contextmanager
def apart(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Keep each of OpenMP's threads, of which this thread is the first, on its own processor.

    Does nothing where the user says where threads run, where there are not as many threads as
    processors (two processes of one thread could meet on one), or without GNU's OpenMP. Changes no
    bit of any result. Processes that are forked meanwhile, such as those that read data, may run on
    all processors.
    """
    global _whole
    places = _places(environment)
    if not places:
        yield
        return
    _whole = {*places}
    first = os.getpid()  # two processes are unlikely to have their first threads on one processor
    _on_each_thread(lambda number: {places[(first + number) % len(places)]})
    try:
        yield
    finally:
        _on_each_thread(lambda _: {*places})
        _whole = set()


def _places(environment: Mapping[str, str]) -> list[int]:
    """Return the processor of each of OpenMP's threads; none: they are to run as they do."""
    if not hasattr(os, "sched_setaffinity") or any(name in environment for name in _CHOSEN):
        return []
    places, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    return places if 1 < threads == len(places) and _parallel() else []


def _parallel():
    """Return OpenMP's function that calls another on each thread; None: another OpenMP is used."""
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None)


def _on_each_thread(processors_of) -> None:
    """Let each thread of this one's pool, by its number, run on some processors alone."""
    number = ctypes.CDLL(None).omp_get_thread_num

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def place(_):
        os.sched_setaffinity(0, processors_of(number()))  # of the calling thread

    _parallel()(place, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))


def _forked() -> None:
    if _whole:
        os.sched_setaffinity(0, _whole)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
