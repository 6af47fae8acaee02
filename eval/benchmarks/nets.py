"""Speed and memory of our U-Net compared to diffusers' `UNet2DModel` with the same weights.

    python -m cascade.eval.benchmarks.nets [--rounds 7] [--batch 4] [--threads 2]

Requires `pip install diffusers`. The networks take turns in one process, and the median time of
each counts. Peak memory is the process's high-water mark (Linux), reset before each measurement.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cascade.conditioning import Cond
from cascade.diffusion.noise import linear_table, table
from cascade.errors import UserError
from cascade.eval.benchmarks import clock
from cascade.formats.texts import lines
from cascade.interop.names.diffusers import unet_rules
from cascade.interop.names.rules import renamed
from cascade.nets.layers import GroupNorm, Timestep
from cascade.nets.unet import UNet

SIZE, STEPS = 64, 1000
CHANNELS, MULTIPLIERS = 64, (1, 2, 3, 4)


def ours(adm: bool, checkpoint: bool = False, channels: int = CHANNELS) -> UNet:
    """ADM's U-Net (residual blocks change the resolution, scale and shift), or DDPM's."""
    return UNet(
        channels=channels,
        multipliers=MULTIPLIERS,
        blocks=2,
        embed=4 * channels,
        attention=(1, 2, 3),
        head_channels=64,
        positions=False,
        strided=not adm,
        shift_only=not adm,
        norm=partial(GroupNorm, groups=32),
        level=Timestep(channels, linear_table),
        checkpoint=checkpoint,
    ).to(memory_format=torch.channels_last)


def theirs(adm: bool, channels: int = CHANNELS) -> nn.Module:
    """The same network from diffusers."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError("this benchmark compares with diffusers: pip install diffusers") from error
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=tuple(channels * m for m in MULTIPLIERS),
        layers_per_block=2,
        down_block_types=(
            f"{'ResnetDownsample' if adm else 'Down'}Block2D",
            *3 * ("AttnDownBlock2D",),
        ),
        up_block_types=(*3 * ("AttnUpBlock2D",), f"{'ResnetUpsample' if adm else 'Up'}Block2D"),
        downsample_type="resnet" if adm else "conv",
        upsample_type="resnet" if adm else "conv",
        resnet_time_scale_shift="scale_shift" if adm else "default",
        attention_head_dim=64,
        attn_norm_num_groups=32,
    )


def copy_weights(source: nn.Module, target: UNet) -> None:
    """Copies the weights of diffusers' network to ours."""
    unused = {r".*\.Conv2d_0\..*": "the same as .conv"}
    found = renamed(source.state_dict(), unet_rules(target, ""), "diffusers", unused)
    target.load_state_dict(found)


Forward = Callable[[Tensor, Tensor], Tensor]


def forward(net: nn.Module) -> Forward:
    """The function (x, t) -> F of either network; t [b] are indices of the linear table."""
    if not isinstance(net, UNet):
        return lambda x, t: net(x, t).sample
    levels = table(linear_table, STEPS, next(net.parameters()).device).float()
    return lambda x, t: net(x, levels[t], Cond())


class Training:
    """A training step and a sampling step of a network, on fixed data."""

    def __init__(self, net: nn.Module, batch: int):
        g = torch.Generator().manual_seed(0)
        device = next(net.parameters()).device
        self.x = torch.randn(batch, 3, SIZE, SIZE, generator=g).to(device)
        self.t = torch.randint(STEPS, (batch,), generator=g).to(device)
        self.forward = forward(net)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def train(self) -> None:
        self.forward(self.x, self.t).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def sample(self) -> None:
        self.forward(self.x, self.t)


def _medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median time of each call, after one warm-up round."""
    times = clock.rounds(calls, rounds + 1, time.perf_counter)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak(make: Callable[[], nn.Module], batch: int, step: str) -> float:
    """Peak memory in MiB of three steps of a new network, above the process's prior memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    training = Training(make(), batch)
    for _ in range(3):
        getattr(training, step)()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    found = lines(Path("/proc/self/status").read_text())
    return next(int(line.split()[1]) for line in found if line.startswith(key))


def difference(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two networks' outputs."""
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 700])
    with torch.inference_mode():
        return (forward(a)(x, t) - forward(b)(x, t)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=lines(__doc__)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for adm in (True, False):
        Console().print(compared(adm, args.batch, args.rounds))


def compared(adm: bool, batch: int, rounds: int) -> Table:
    """The table for one network."""
    makers = {
        "diffusers": partial(theirs, adm),
        "ours": partial(ours, adm),
        "ours, checkpointed": partial(ours, adm, checkpoint=True),
    }
    held = {s: {n: peak(make, batch, s) for n, make in makers.items()} for s in ("train", "sample")}
    nets = {name: make() for name, make in makers.items()}
    for net in list(nets.values())[1:]:
        copy_weights(nets["diffusers"], net)
    steps = {name: Training(net, batch) for name, net in nets.items()}
    same = difference(nets["diffusers"], nets["ours"])
    took = {
        s: _medians({name: getattr(step, s) for name, step in steps.items()}, rounds)
        for s in ("train", "sample")
    }
    count = sum(p.numel() for p in nets["ours"].parameters())
    title = (
        f"{'ADM' if adm else 'DDPM'}, {count / 1e6:.2f} M parameters, {SIZE} px, batch {batch},\n"
        f"{torch.get_num_threads()} threads; outputs differ by {same:.0e}, at most 1e-4"
    )
    table = Table("", "diffusers", "ours", "ratio, at most", "checkpointed", "ratio, at most")
    table.title = title
    for what, step in (("training", "train"), ("sampling", "sample")):
        for unit, values in (("s", took[step]), ("peak MiB", held[step])):
            a, b, c = values.values()
            limit = ", 1.35" if (step, unit) == ("train", "s") else ""
            row = f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}, 0.80", f"{c:.3g}", f"{c / b:.2f}{limit}"
            table.add_row(f"{what}, {unit}", *row)
    return table


if __name__ == "__main__":
    main()
