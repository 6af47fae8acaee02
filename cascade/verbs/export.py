"""`cascade export`: a trained cascade, as a folder for other machines and other programs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.export.card import write_card
from cascade.files.atomic import check_writable, write_atomically


def main(args: argparse.Namespace) -> Sequence[Path]:
    model, out = Path(args.model), Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    check_writable(out.parent, "choose another --out")
    notes: list[str] = []
    write_atomically(out, lambda folder: notes.extend(write_card(model, folder, args.license)))
    for note in notes:
        print(note)
    print(f"{out}: cascade sample --model {out}")
    return []
