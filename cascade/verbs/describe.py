"""`cascade describe`: a network's parameters by part, counted on the meta device."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from cascade.verbs.configuration import built, composed


def main(args: argparse.Namespace) -> None:
    config = composed("train", ["data.path=none", *args.overrides])
    with torch.device("meta"):
        module = built(config.stage)
    parts = {"conditioner": module.conditioner} if hasattr(module, "conditioner") else {}
    parts.update(getattr(module, "net", module).named_children())
    table = Table("part", "parameters", title=f"{config.name}: {type(module).__name__}")
    for name, part in parts.items():
        table.add_row(name, f"{sum(p.numel() for p in part.parameters()):,}")
    table.add_row("all", f"{sum(p.numel() for p in module.parameters()):,}", style="bold")
    Console().print(table)
