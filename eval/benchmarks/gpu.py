"""Training rates on a GPU, eager and compiled, and compared to diffusers; then the demo.

    python -m cascade.eval.benchmarks.gpu [--batch 64] [--steps 20] [--demo runs/gpu_demo]

For each training: images per second, and the share of the rate of a large product of matrices in
bfloat16, measured in the same process. FLOPs are those that `cascade describe` counts, without
recomputation. Takes about ten minutes on one H200. Requires `pip install diffusers` for the
comparison, which is omitted without it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cascade.batch import Batch
from cascade.config.compose import built
from cascade.data.loading import on
from cascade.errors import UserError
from cascade.eval.benchmarks import nets
from cascade.eval.benchmarks.demo import OWN, took
from cascade.formats.texts import lines
from cascade.trainable import Trainable
from cascade.training.rehearsal import batches, rehearsed

TRAININGS = (
    ["experiment=imagen_base64", "net=imagen_300m"],
    ["experiment=unclip_prior"],
)
WARM = 3  # steps before the clock starts


def seconds(step: Callable[[], object], steps: int, device: str) -> float:
    """Mean seconds of a call, after `WARM` others."""
    for k in range(WARM + steps):
        if k == WARM:
            _finished(device)
            begin = time.perf_counter()
        step()
    _finished(device)
    return (time.perf_counter() - begin) / steps


def matrix_rate(device: str, side: int = 8192, steps: int = 20) -> float:
    """FLOPs per second of a product of two square bfloat16 matrices."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / seconds(lambda: a @ a, steps, device)


def training(module: Trainable, batch: Batch) -> Callable[[], None]:
    """A training step in bfloat16 with float32 weights, on fixed data."""
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    device = next(module.parameters()).device.type
    numbers = iter(range(10**9))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = module.training_step(batch, next(numbers))
        loss.backward()
        module.after_backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rates(
    overrides: list[str], batch: int, steps: int, device: str, backend: str = "inductor"
) -> dict[str, tuple[float, float]]:
    """Images and training FLOPs per second of a stage, eager and compiled."""
    config, rehearsal = rehearsed(overrides)
    flops = rehearsal.step(bf16=True).flops
    found = {}
    for name in ("eager", "compiled"):
        module = built(config.stage).to(device)
        given = on(batches(config, module)(batch), device)
        if name == "compiled":
            torch.compiler.reset()
            module.net.compile(backend=backend)
        each = batch / seconds(training(module, given), steps, device)
        found[name] = each, each * flops
    return found


def peer(channels: int, batch: int, steps: int, device: str, compiled: bool) -> dict[str, float]:
    """Seconds of a float32 training step of diffusers' U-Net, and of ours, the same network."""
    found = {}
    for name, make in (("diffusers", nets.theirs), ("ours", nets.ours)):
        net = make(True, channels=channels).to(device)
        if compiled:
            torch.compiler.reset()
            net.compile()
        found[name] = seconds(nets.Training(net, batch).train, steps, device)
    return found


def table(found: dict[str, dict[str, tuple[float, float]]], rate: float) -> Table:
    """Rates by training and way, in images per second and in shares of the matrix rate."""
    out = Table("training", "way", "images per second", "share of the matrix rate")
    out.title = f"products of matrices: {rate / 1e12:,.1f} TFLOP/s"
    for name, ways in found.items():
        for way, (each, flops) in ways.items():
            out.add_row(name, way, f"{each:,.1f}", f"{flops / rate:.1%}")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=lines(__doc__)[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--demo", type=Path, help="where to run the demo; default: not at all")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU that torch can use, and found none")
    rate, console = matrix_rate("cuda"), Console()
    for one in TRAININGS:
        found = {" ".join(one): rates(one, args.batch, args.steps, "cuda")}
        console.print(table(found, rate))
    if find_spec("diffusers"):
        for compiled in (False, True):
            a, b = peer(192, args.batch // 4, args.steps, "cuda", compiled).values()
            way = "compiled" if compiled else "eager"
            console.print(f"ADM's U-Net, {way}: {a:.3g} s, ours {b:.3g} s, ratio {b / a:.2f}")
    if args.demo:
        took([OWN, "demo", f"run={args.demo}"])


def _finished(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
