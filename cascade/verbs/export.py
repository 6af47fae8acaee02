"""`cascade export`: a trained cascade, as a folder for other machines and other programs."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.export.card import write_card
from cascade.export.pipeline import write_diffusers
from cascade.files.atomic import check_writable, write_atomically
from cascade.files.stores.places import Remote, files_of, place, upload

README = "README.md"  # written last


def main(args: argparse.Namespace) -> Sequence[Path]:
    model, out = Path(args.model), place(args.out)
    if isinstance(out, Remote):
        if files_of(out):
            raise UserError(f"{out} exists: choose another --out")
        with tempfile.TemporaryDirectory() as room:
            told = _write(args, model, folder := Path(room) / out.name)
            upload(folder, out, last=README)
        print(*told, f"{out}: copy it to a disk; its {README} says how to use it", sep="\n")
        return []
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    check_writable(out.parent, "choose another --out")
    told = _write(args, model, out)
    use = {
        "card": f"cascade sample --model {out}",
        "diffusers": f"its {README} says how to load it",
    }
    print(*told, f"{out}: {use[args.format]}", sep="\n")
    return []


def _write(args: argparse.Namespace, model: Path, out: Path) -> list[str]:
    """Write the folder; return what the user is to know of it."""
    notes: list[str] = []
    if args.format == "diffusers":
        write_atomically(out, lambda folder: write_diffusers(model, folder))
    else:
        write_atomically(out, lambda folder: notes.extend(write_card(model, folder, args.license)))
    return notes
