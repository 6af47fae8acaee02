"""`cascade import`: the published weights of another system, as runs to sample and to train."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.files.atomic import check_writable
from cascade.interop.cascades import CASCADES, whole
from cascade.interop.systems import STAGES, imported
from cascade.runs.run import CASCADE, CONFIG


def main(args: argparse.Namespace) -> Sequence[Path]:
    out, source = Path(args.out), Path(args.source)
    if args.kind not in (*STAGES, *CASCADES):
        kinds = ", ".join(dict.fromkeys([*STAGES, *CASCADES]))
        raise UserError(f"{args.kind} is no kind of weights that can be imported: choose {kinds}")
    check_writable(out.parent, "choose another --out")
    # GLIDE's base alone is a kind as well, which takes its file.
    if args.kind in CASCADES and source.is_dir() and (args.kind != "glide" or _both(source)):
        found = whole(args.kind, source)
        found.write(out, args.overrides)
        stages, done = list(found.stages.values()), out / CASCADE
    else:
        stages, done = [imported(args.kind, source)], out / CONFIG
        stages[0].write(out, args.overrides)
    for stage in stages:
        count = sum(x.numel() for x in stage.tensors.values())
        print(f"{stage.system}: {count:,} numbers; license: {stage.license}")
        for pattern, reason in stage.unused.items():
            print(f"left out: {pattern} ({reason})")
    print(f"written to {out}")
    return [done]


def _both(source: Path) -> bool:
    return (source / "upsample.pt").is_file()
