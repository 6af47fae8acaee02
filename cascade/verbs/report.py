"""`cascade report`: write the pages, tables and figures of sweeps, and the page of findings."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.eval.sweeps.page import write_report


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Return the sweeps' pages."""
    out, findings = (Path(place) if place else None for place in (args.out, args.findings))
    pages = write_report(Path(args.dir), out, findings)
    for page in pages:
        print(page)
    return [page for page in pages if page.name == "report.html"]
