"""`cascade report`: the page of a sweep, its tables and figures, and the page of findings."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.eval.ablation import ABOUT, Sweep, read
from cascade.eval.figures import save_drawings
from cascade.eval.findings import write_findings
from cascade.eval.page import write_index, write_page
from cascade.eval.tables import write_cells, write_summary
from cascade.files import check_writable


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Returns the pages that it wrote."""
    root = Path(args.dir)
    sweeps = _sweeps(root)
    if args.findings:
        check_writable(Path(args.findings).parent, "choose another --findings")
        write_findings(Path(args.findings), sweeps)
        print(args.findings)
    if all(sweep.folder is None for sweep in sweeps) and not args.out:
        return []  # tables of findings: there is nothing to add to their page
    out, alone = Path(args.out or root), (root / ABOUT).is_file()
    check_writable(out, "choose another --out")
    pages = [(sweep, out if alone else out / sweep.place) for sweep in sweeps]
    for sweep, folder in pages:
        write_cells(sweep, folder / "cells.csv")
        write_summary(sweep, folder / "summary.csv")
        save_drawings(sweep, folder / "figures")
        write_page(sweep, folder / "report.html")
        print(folder / "report.html")
    if not alone:
        write_index(pages, out / "index.html")
        print(out / "index.html")
    return [folder / "report.html" for _, folder in pages]


def _sweeps(root: Path) -> list[Sweep]:
    """The sweep in a folder, or all in its folders, or all tables of sweeps in it."""
    for pattern in (ABOUT, f"*/{ABOUT}", "*.json"):
        if files := sorted(root.glob(pattern)):
            return [read(path.parent if path.name == ABOUT else path) for path in files]
    raise UserError(f"{root} holds no sweep: name a folder that `cascade sweep` wrote")
