"""Jobs of one or more ranks in processes of their own, which start with everything imported."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_IMPORTED = [
    "cascade.training.fit",
    "cascade.verbs.train",
    "cascade.verbs.data",
    "hydra",
    "open_clip",
    "transformers",
]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


class Job:
    """`target(*args)` on each of `ranks` processes, which find each other as `torchrun`'s do.

    Args:
        target: importable by name; what it returns, or exits with, is the exit code.
        args: of it.
        ranks: how many processes.
        out: folder of what they print: `rank0.txt`, `rank1.txt`, ...
        env: further environment variables.
    """

    def __init__(
        self,
        target: Callable[..., int | None],
        args: Sequence[Any] = (),
        *,
        out: Path,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
    ):
        out.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [out / f"rank{rank}.txt" for rank in range(ranks)]
        self.processes = []
        for rank, file in enumerate(self.files):
            own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
            if ranks > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                own |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                own |= {"TORCHELASTIC_RUN_ID": "test"}
            process = _context().Process(target=_run, args=(target, args, own, str(file)))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 60) -> list[int]:
        """The exit codes; minus the signal for those that one killed."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                self.kill(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def output(self, rank: int | None = None) -> str:
        """What the ranks printed, or one of them."""
        files = self.files if rank is None else [self.files[rank]]
        return "".join(file.read_text() for file in files if file.exists())


def cascade_in_group(argv: Sequence[str]) -> int:
    """`cascade ARGV` in a process group of its own, with Ctrl-C as in a terminal, and data workers
    that start at once."""
    from cascade import cli

    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main(argv)


def _run(target: Callable, args: Sequence[Any], env: Mapping[str, str], out: str) -> None:
    os.environ.update(env)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.exit(target(*args))
