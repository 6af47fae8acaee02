"""`cascade data caption`: a captioner describes the pictures of shards."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cascade.data.embeddings import MANIFEST
from cascade.data.recaptions.reading import CAPTIONS
from cascade.errors import UserError
from cascade.files.stores.places import place
from cascade.runs.progress import shown


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Write the captions of a folder of shards; return the manifest, for job chains."""
    _check(args)
    from cascade.data.precompute import precompute
    from cascade.data.recaptions.writing import Asked, counted, rows
    from cascade.encoders.captioner import Captioner
    from cascade.encoders.clip import FrozenCLIP
    from cascade.runs.model import device

    data = place(args.data)
    out = place(args.out) if args.out else data / CAPTIONS
    captioner = Captioner(args.model, args.prompt, args.tokens, args.bf16).to(device())
    clip = FrozenCLIP(args.clip).to(device()) if args.clip else None
    filtered = {"clip": clip, "least": args.least} if clip else {}
    asked = Asked(captioner, args.field, args.samples, args.seed, args.tags, **filtered)
    captioner.load(args.tags)
    _ = clip and clip.hash  # so that a folder that is no CLIP is refused before work begins
    with shown("captions", "shards") as progress:
        make = partial(rows, asked=asked, batch=args.batch, workers=args.workers)
        precompute(data, out, asked.about, make, progress)
    samples, captioned, lost = counted(data, out, args.field)
    print(f"{out} holds captions of {captioned:,} of {samples:,} pictures in {args.field}")
    if clip:
        print(f"{lost:,} captions were left out, whose CLIP score is below {args.least:g}")
    return [out / MANIFEST] if isinstance(out, Path) else []


def _check(args: argparse.Namespace) -> None:
    """Check the options. Raises UserError."""
    if args.field in ("txt", "tags"):
        raise UserError(f"--field {args.field} is taken: choose another name, such as long_caption")
    if min(args.samples, args.batch, args.tokens) < 1:
        raise UserError("--samples, --batch and --tokens: give 1 or more")
    if args.clip and args.least is None:
        raise UserError(
            "--clip needs --least SCORE, below which captions are left out (such as 0.2)"
        )
    if args.least is not None and not -1 <= args.least <= 1:
        raise UserError(f"--least {args.least:g}: a cosine, choose -1 to 1")
