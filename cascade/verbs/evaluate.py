"""`cascade evaluate`: measures a cascade, or pictures on disk; writes numbers and a report."""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from cascade.config.compose import loaded
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.eval.metrics import features
from cascade.eval.metrics.features import CLEAN, PYTORCH_FID, TENSORFLOW, Features
from cascade.eval.pictures.share import share, whole
from cascade.files.atomic import beside, check_writable
from cascade.files.lease import lease
from cascade.files.stores.places import on_disk
from cascade.runs.model import device

RESIZES = {"clean": CLEAN, "pytorch": PYTORCH_FID, "tensorflow": TENSORFLOW}


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Returns the files that an evaluation of a cascade leaves; none for pictures."""
    if args.config:
        return _asked(Path(args.config))
    return evaluate_pictures(args) if args.pictures else evaluate_cascade(args)


def _asked(file: Path) -> Sequence[Path]:
    """`--config`: measures a cascade as a file says, by the arguments of `evaluation.evaluate`."""
    from cascade.eval.cascades.evaluation import evaluate

    given: Any = OmegaConf.to_container(loaded(file))
    try:
        inspect.signature(evaluate).bind(**given)
    except TypeError as error:
        raise UserError(f"{file}: {error}: submit the evaluation again") from error
    return _evaluate(**given | {"guidance": [float(scale) for scale in given["guidance"]]})


def evaluate_cascade(args: argparse.Namespace) -> Sequence[Path]:
    """`--model`: writes metrics.json and report.html."""
    if not (args.data and args.judge):
        raise UserError("--model is measured on --data SHARDS with a --judge CLIP: give both")
    try:
        scales = "1,2,4" if args.guidance is None else args.guidance
        guidance = [float(scale) for scale in scales.split(",") if scale]
    except ValueError:
        raise UserError(f"--guidance {args.guidance}: give scales such as 1,2,4") from None
    geneval = args.geneval or 0
    if geneval < 0:
        raise UserError(f"--geneval {geneval}: give a number of prompts, or leave it out")
    if (bound := args.bound or 0) < 0 or bound == 1:
        raise UserError(f"--bound {bound}: give a number of steps above 1, or leave it out")
    if (edits := args.edits or 0) < 0:
        raise UserError(f"--edits {edits}: give a number of pictures, or leave it out")
    if (control := args.control or 0) < 0:
        raise UserError(f"--control {control}: give a number of scenes, or leave it out")
    return _evaluate(
        args.model,
        args.data,
        args.judge,
        {args.split or "val": 320 if args.count is None else args.count},
        guidance,
        args.seed or 0,
        out=args.out,
        choices=args.set,
        geneval=geneval,
        bound=bound,
        typographic=bool(args.typographic),
        edits=edits,
        control=control,
    )


def _evaluate(
    model: str,
    data: str,
    judge: str,
    counts: Mapping[str, int],
    guidance: Sequence[float],
    seed: int,
    out: str | None = None,
    **asked: Any,
) -> Sequence[Path]:
    """Measures a cascade while no other process does; arguments as of `evaluation.evaluate`."""
    from cascade.eval.cascades.evaluation import evaluate

    if not Path(judge).is_dir():
        raise UserError(f"--judge {judge} is no directory: give that of a CLIP")
    place = Path(model)
    folder = Path(out) if out else place.parent if place.suffix == ".yaml" else place
    check_writable(folder, "choose another --out")
    shards = on_disk(data, "cascades are measured")
    with lease(folder):
        evaluate(place, shards, Path(judge), counts, guidance, seed, out=folder, **asked)
    print(f"{folder / 'metrics.json'}, {folder / 'report.html'}")
    return [folder / "metrics.json", folder / "report.html"]


def evaluate_pictures(args: argparse.Namespace) -> Sequence[Path]:
    """`--pictures`: prints a table, and writes numbers.json and report.html."""
    from cascade.eval.pictures import record
    from cascade.eval.pictures.evaluation import evaluation

    if (args.bootstrap or 0) < 0:
        raise UserError("--bootstrap: give a number of draws, or 0 for no intervals")
    pictures = Path(args.pictures)
    out = Path(args.out) if args.out else beside(pictures, ".evaluation")
    check_writable(out, "choose another --out")
    shard, spaces = share(args.shard), spaces_of(args)
    work = evaluation(
        pictures,
        args.reference,
        captions=Path(args.captions) if args.captions else None,
        captioned=bool(args.clip),
        alone=bool(args.inception),
        mixed=args.resize is not None,
        cache=Path(args.cache) if args.cache else None,
        device=device(),
        **({} if args.bootstrap is None else {"draws": args.bootstrap}),
    )
    work.check_apart(out)
    records = work.records(spaces, shard)
    if records is None:
        print(
            f"the features of shard {shard[0]}/{shard[1]} are complete. The last shard to finish "
            f"measures; if another shard never runs, this completes it: {whole(args)}"
        )
        return []
    for note in work.notes:
        print(note)
    Console().print(*record.tables(records), sep="\n\n")
    work.save(records, out)
    print(f"{out / 'numbers.json'}, {out / 'report.html'}")
    return []


def spaces_of(args: argparse.Namespace) -> list[Features]:
    """The feature spaces of the options. UserError if there is none, or weights are missing."""
    found: list[Features] = []
    if args.resize not in (None, "clean") and not args.inception:
        raise UserError(f"--resize {args.resize} is Inception's: give --inception FILE, or clean")
    if args.inception:
        resize = {"resize": RESIZES[args.resize]} if args.resize else {}
        found.append(features.InceptionFeatures(args.inception, **resize).to(device()))
    if args.dino:
        from cascade.eval.metrics.dinov2 import DINOv2Features

        found.append(DINOv2Features(args.dino).to(device()))
    if args.clip:
        clip = FrozenCLIP(args.clip, args.checkpoint, args.quick_gelu)
        found.append(features.CLIPFeatures(clip.to(device())))
    if not found:
        raise UserError("no features to measure in: give --inception FILE, --clip or --dino DIR")
    return found
