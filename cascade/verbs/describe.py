"""`cascade describe`: a network's parameters, and the cost of its training, without allocation."""

import argparse
import logging
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cascade.encoders.identity import Encoder
from cascade.encoders.weights import NotHere
from cascade.errors import UserError
from cascade.nets.cost import GIB, Rehearsal, Way, parameters, parts
from cascade.trainable import Trainable
from cascade.training.rehearsal import rehearsed

# If no stage is named, the first of these that the network fits is described.
STAGES = (
    ["stage=decoder"],
    ["stage=decoder", "process=cosine_eps_learned"],
    ["stage=prior"],
    ["stage=prior_ar"],
    ["stage=prior_ar", "clip=unclip"],
    ["stage=sr256"],
    ["stage=sr256_text"],
    ["stage=sr256_text", "process=cosine_eps_learned"],
)

# Share of a GPU's memory that training can use; CUDA and fragmentation take the rest.
USABLE = 0.9


class GPUs(NamedTuple):
    """The arguments that are no overrides: GiB per GPU, and the number of GPUs."""

    gpu_memory: float = 80.0
    gpus: int = 8


def main(args: argparse.Namespace) -> None:
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    gpus, overrides = _arguments(args.overrides)
    overrides, config, rehearsal = _fitting(overrides)
    micro_batch = config.micro_batch or -(-config.batch // gpus.gpus)
    console = Console()
    console.print(_parts(" ".join(overrides), rehearsal.module))
    with warnings.catch_warnings(action="ignore"):  # Lightning misses its Trainer
        console.print(_cost(rehearsal, micro_batch, gpus))
        console.print(_notes(rehearsal, micro_batch, gpus))


def _arguments(arguments: Sequence[str]) -> tuple[GPUs, list[str]]:
    """Separates our own arguments from Hydra's overrides."""
    ours, rest = {}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in GPUs._fields:
            rest.append(argument)
            continue
        try:
            ours[key] = GPUs.__annotations__[key](value)
        except ValueError:
            ours[key] = 0
        if not 0 < ours[key] < float("inf"):
            what = "a number of GiB" if key == "gpu_memory" else "a whole number"
            raise UserError(f"{argument}: choose {what} above 0")
    return GPUs(**ours), rest


def _fitting(overrides: list[str]) -> tuple[list[str], DictConfig, Rehearsal]:
    """The overrides of the requested stage, or of the first that the network fits, rehearsed."""
    if any(o.startswith(("stage=", "experiment=")) for o in overrides):
        return overrides, *rehearsed(overrides)
    refusals = []
    for stage in STAGES:
        try:
            return [*stage, *overrides], *rehearsed([*stage, *overrides])
        except UserError as error:
            refusals.append(str(error))
    hint = f" (with {STAGES[0][0]}; no other stage fits either: name one with stage=...)"
    raise UserError(refusals[0] + (hint if len({*refusals}) > 1 else ""))


def _ways(rehearsal: Rehearsal, gpus: int) -> dict[str, Way]:
    """Ways to train on GPUs, by name; with checkpointing if the network supports it."""
    steps = {"": rehearsal.step(bf16=True)}
    if rehearsal.switched:
        steps[",\ncheckpointing"] = rehearsal.step(bf16=True, checkpointing=True)
    whole = {f"DDP{name}": Way(rehearsal, step) for name, step in steps.items()}
    return whole | {f"sharded{name}": Way(rehearsal, step, gpus) for name, step in steps.items()}


def _parts(title: str, module: Trainable) -> Table:
    table, total = Table("part", title=title), parameters(module)
    for heading in ("parameters", "share"):
        table.add_column(heading, justify="right")
    for name, count in parts(module).items():
        table.add_row(name, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}", "", style="bold")
    return table


def _cost(rehearsal: Rehearsal, micro_batch: int, gpus: GPUs) -> Table:
    ways, limit = _ways(rehearsal, gpus.gpus), int(USABLE * gpus.gpu_memory * GIB)
    memories = [way.memory(micro_batch) for way in ways.values()]
    title = f"Training on {gpus.gpus} GPUs, {micro_batch} samples at a time on each"
    table = Table("", title=title)
    for name in ways:
        table.add_column(name, justify="right")
    table.add_row("forward, GFLOP", *[_number(rehearsal.forward / 1e9)] * len(ways))
    table.add_row("training, GFLOP", *[_number(way.step.flops / 1e9) for way in ways.values()])
    table.add_section()
    for purpose in vars(memories[0]):
        table.add_row(f"{purpose}, GiB", *[_number(vars(m)[purpose] / GIB) for m in memories])
    table.add_row("total, GiB", *[_number(m.total / GIB) for m in memories], style="bold")
    table.add_section()
    fits = ["yes" if m.total <= limit else "no" for m in memories]
    table.add_row(f"fits {gpus.gpu_memory:g} GiB", *fits)
    table.add_row("most at a time", *[f"{way.largest(limit):,}" for way in ways.values()])
    return table


def _notes(rehearsal: Rehearsal, micro_batch: int, gpus: GPUs) -> str:
    cpu = Way(rehearsal, rehearsal.step()).memory(micro_batch)
    notes = (
        "GFLOP are 1e9 additions and multiplications, for one sample. Memory is with bfloat16 "
        "autocast, AdamW, averages in float32, captions of full length; activations are all else "
        "that a step holds at its worst moment, under DDP with the weights in bfloat16. Sharding "
        f"divides weights, gradients, optimizer and average by {gpus.gpus}; gathered is what a GPU "
        f"holds undivided meanwhile. What fits is at most {USABLE:.0%} of the memory. On a CPU, in "
        f"float32, the total is {_number(cpu.total / GIB)} GiB, of which activations "
        f"{_number(cpu.activations / GIB)}."
    )
    encoders = getattr(rehearsal.module, "encoders", ())
    frozen = [encoder for encoder in encoders if "text" in encoder.writes]
    return notes + "".join(
        f" Not counted: {encoder.name}{_size(encoder)}, frozen, on each GPU." for encoder in frozen
    )


def _size(encoder: Encoder) -> str:
    """The number of an encoder's parameters, if it is known and its files are here."""
    try:
        return f" ({encoder.parameters:,} parameters)" if hasattr(encoder, "parameters") else ""
    except NotHere:
        return ""


def _number(x: float) -> str:
    return f"{x:,.1f}" if x >= 10 else f"{x:.3f}" if x else "0"
