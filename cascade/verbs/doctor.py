"""`cascade doctor`: check the installation, the machine, shards, runs, cascades and encoders.

It must run on a broken installation, so it imports only the standard library, and modules that do
the same, at its top.
"""

import argparse
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import partial

from cascade.doctor import probe
from cascade.doctor.finding import guarded, some
from cascade.doctor.output import as_json, text
from cascade.doctor.subjects import subjects
from cascade.errors import UserError
from cascade.files.stores.places import place

IMPORTING, ANY = 15.0, 600.0  # limit of imports in seconds: without --full, and with it


def main(args: argparse.Namespace) -> None:
    """Print the findings. Raises UserError if one of them is a problem."""
    process = probe.started(probe.MODULES if args.full else probe.MODULES[:1])
    answer = partial(probe.answer, process, ANY if args.full else IMPORTING)
    found, out = [], sys.stdout
    with redirect_stdout(sys.stderr):  # a check that timed out may still print
        for name, check in subjects([place(p) for p in args.paths], args.full, answer):
            found.append((name, list(guarded(check))))
            if not args.json:
                print(text(*found[-1]), flush=True, file=out)
    counts = Counter(finding.level for _, of in found for finding in of)
    if args.json:
        print(as_json(found, counts), flush=True)
    said = ", ".join(some(counts[level], level) for level in ("problem", "warning"))
    if counts["problem"]:
        raise UserError(said)
    if not args.json:
        print(said)
