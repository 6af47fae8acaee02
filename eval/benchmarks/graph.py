"""Sampling by static graphs, compared with eager: compiled, exported ahead of time, ONNX Runtime.

    python -m cascade.eval.benchmarks.graph --model runs/demo [--way eager --way onnx]
        [--pictures 1] [--rounds 5]

Each way paints the same pictures in a process of its own, which begins with empty caches. The first
time holds all compilation; of later ones the median counts, for each stage and for the whole
cascade. Times are CPU seconds, so that other processes hardly matter, and on a GPU wall seconds.
Memory is the process's greatest, or the GPU's. Differences from eager are in grey levels of the
last pictures.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cascade.batch import Batch
from cascade.conditioning.cond import Cond
from cascade.errors import UserError
from cascade.eval.benchmarks.clock import wall
from cascade.eval.benchmarks.demo import took
from cascade.files.atomic import write_text
from cascade.formats.texts import lines
from cascade.pipeline import Cascade, innermost
from cascade.runs.model import device, load_cascade, paint

CAPTION = "a red circle above a blue square"
WHOLE = "all"
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

Forward = Callable[..., Tensor]
Times = dict[str, dict[str, float]]  # by stage


class _Flat(nn.Module):
    """A network that reads its condition as separate tensors, as exported graphs do."""

    def __init__(self, net: nn.Module, like: Cond, names: Sequence[str]):
        super().__init__()
        self.net, self.like, self.names = net, like, names

    def forward(self, x: Tensor, logsnr: Tensor, *ports: Tensor) -> Tensor:
        cond = replace(self.like, **dict(zip(self.names, ports)))
        return type(self.net).forward(self.net, x, logsnr, cond)


class Exported:
    """A network's forward, exported on first use for each shape of its arguments.

    Args:
        make: exports a module for such arguments; returns what then computes the same.
    """

    def __init__(self, net: nn.Module, make: Callable[[nn.Module, tuple[Tensor, ...]], Forward]):
        self.net, self.make = net, make
        self.made: dict[Any, Forward] = {}

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond) -> Tensor:
        ports = {f.name: getattr(cond, f.name) for f in fields(cond)}
        ports = {name: port for name, port in ports.items() if isinstance(port, Tensor)}
        given = (x, logsnr, *ports.values())
        key = (tuple(ports), cond.after_text, *((one.shape, one.dtype) for one in given))
        if key not in self.made:
            like = replace(cond, **dict.fromkeys(ports))
            with torch.inference_mode(False), torch.no_grad():
                flat = _Flat(self.net, like, tuple(ports)).eval()
                self.made[key] = self.make(flat, tuple(one.clone() for one in given))
        return self.made[key](*given)


def compiled(net: nn.Module, mode: str) -> Forward:
    return torch.compile(partial(type(net).forward, net), mode=mode, dynamic=False)


def _ahead(flat: nn.Module, given: tuple[Tensor, ...]) -> Forward:
    folder = tempfile.mkdtemp(dir=os.environ.get(_CACHES[0]))
    program = torch.export.export(flat, given)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(Path(folder) / "net.pt2")
    )
    return torch._inductor.aoti_load_package(package)


def _onnx(flat: nn.Module, given: tuple[Tensor, ...]) -> Forward:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("--way onnx needs ONNX Runtime: pip install cascade[onnx]") from error
    program = torch.onnx.export(flat, given, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    available = onnxruntime.get_available_providers()
    wanted = [f"{kind}ExecutionProvider" for kind in ("CUDA", "CPU")]
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(),
        options,
        providers=[name for name in wanted if name in available],
    )
    names = [one.name for one in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        arrays = [one.detach().cpu().numpy() for one in given]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays)))[0]).to(given[0].device)

    return run


# What computes a network's forward, by the name of the way.
WAYS: dict[str, Callable[[nn.Module], Forward] | None] = {
    "eager": None,
    "compile": partial(compiled, mode="default"),
    "reduce-overhead": partial(compiled, mode="reduce-overhead"),
    "max-autotune": partial(compiled, mode="max-autotune"),
    "ahead of time": partial(Exported, make=_ahead),
    "onnx": partial(Exported, make=_onnx),
}
ON_GPU = {"reduce-overhead"}  # records CUDA graphs, and elsewhere is as `compile`


def measured(model: Path, way: str, pictures: int, rounds: int) -> tuple[Times, Batch]:
    """Paint in one way; return the seconds by stage, and what the stages wrote.

    Raises:
        UserError: the way needs a package that is missing, or a stage's network is steered.
    """
    cascade = load_cascade(model)
    if make := WAYS[way]:
        for net in {id(net): net for net in map(_network, cascade.stages)}.values():
            net.forward = make(net)
    clock = wall(device()) if torch.cuda.is_available() else _cpu
    given: Batch = {}
    captions, times = [CAPTION] * pictures, {}
    for link in cascade.stages:
        alone = partial(paint, Cascade([link]), captions, 0, pictures, given=dict(given))
        first = _seconds(alone, clock)
        later = [_seconds(alone, clock) for _ in range(rounds)]
        times[link.writes] = {"first": first, "later": statistics.median(later)}
        given[link.writes] = alone()[link.writes]
    times[WHOLE] = {of: sum(one[of] for one in times.values()) for of in ("first", "later")}
    return times, given


def _network(link: Any) -> nn.Module:
    return innermost(link).net


def _cpu() -> float:
    """CPU seconds of this process, and of the compilers that it has run."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + spent.ru_utime + spent.ru_stime


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def child(args: argparse.Namespace) -> None:
    """Measure one way, and write the times, the GPU's memory and the pictures."""
    torch.set_num_threads(args.threads)
    times, made = measured(args.model, args.way[0], args.pictures, args.rounds)
    np.save(args.out / "pictures.npy", list(made.values())[-1].numpy())
    memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    write_text(args.out / "times.json", json.dumps({"times": times, "memory": memory}))


def compared(args: argparse.Namespace, ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run each way in a process of its own: its times, memory, and pictures, or what failed."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            out = Path(folder) / way.replace(" ", "-")
            out.mkdir()
            os.environ.update({name: str(out) for name in _CACHES})
            if not torch.cuda.is_available():
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # whose time `_cpu` counts
            command = [sys.executable, "-m", __spec__.name, "--model", args.model, "--way", way]
            for name in ("pictures", "rounds", "threads", "out"):
                command += [f"--{name}", str(out if name == "out" else getattr(args, name))]
            try:
                spent = took(command)
            except (UserError, subprocess.SubprocessError):
                found[way] = {}
                continue
            one = json.loads((out / "times.json").read_text())
            one["memory"] = one["memory"] or spent["memory"]
            found[way] = {**one, "pictures": np.load(out / "pictures.npy")}
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Seconds of each stage and of the cascade, by way, with the ratio to eager's later ones."""
    base = next(iter(found.values()))
    out = Table("", "stage", "first", "later", "ratio", "MiB", "largest difference")
    for way, one in found.items():
        if not one:
            out.add_row(way, "failed: see above")
            continue
        for stage, took_ in one["times"].items():
            last = stage == WHOLE
            ratio = took_["later"] / base["times"][stage]["later"]
            row = [way, stage, f"{took_['first']:.2f}", f"{took_['later']:.3f}", f"{ratio:.2f}"]
            difference = abs(one["pictures"] - base["pictures"]).max() * 127.5 if last else 0
            out.add_row(*row, *([f"{one['memory']:,.0f}", f"{difference:.2g}"] if last else []))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=lines(__doc__)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--way", action="append", choices=WAYS, help="(default: all of the device)")
    parser.add_argument("--pictures", type=int, default=1, help="of a batch (1)")
    parser.add_argument("--rounds", type=int, default=5, help="of later pictures (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of one way alone
    args = parser.parse_args(argv)
    if args.out:
        child(args)
        return
    there = [way for way in WAYS if torch.cuda.is_available() or way not in ON_GPU]
    ways = list(dict.fromkeys(["eager", *(args.way or there)]))
    Console().print(table(compared(args, ways)))


if __name__ == "__main__":
    main()
