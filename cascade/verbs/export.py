"""`cascade export`: a trained cascade, as a folder for other machines and other programs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.export.card import write_card
from cascade.export.pipeline import write_diffusers
from cascade.files.atomic import check_writable, write_atomically


def main(args: argparse.Namespace) -> Sequence[Path]:
    model, out = Path(args.model), Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    check_writable(out.parent, "choose another --out")
    notes: list[str] = []
    if args.format == "diffusers":
        write_atomically(out, lambda folder: write_diffusers(model, folder))
        print(f"{out}: its README.md says how to load it")
    else:
        write_atomically(out, lambda folder: notes.extend(write_card(model, folder, args.license)))
        print(*notes, f"{out}: cascade sample --model {out}", sep="\n")
    return []
