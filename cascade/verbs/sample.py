"""`cascade sample`: sample pictures of captions with a whole cascade."""

import argparse
from pathlib import Path

from PIL import Image

from cascade.errors import UserError
from cascade.eval.pictures.prompts import read_prompts
from cascade.files.atomic import check_writable
from cascade.grids import grid, to_uint8
from cascade.runs.checker import Checker
from cascade.runs.control import controls_of
from cascade.runs.model import (
    captions_asked,
    check_asked,
    compile_networks,
    device,
    distilled,
    frame_asked,
    load_cascade,
    paint,
)


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png file")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists: choose another --out, or add --overwrite")
    check_writable(out.parent, "choose another --out")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch are at least 1")
    listed = [prompt.text for prompt in read_prompts(Path(args.file))] if args.file else []
    texts = [*args.captions, *listed]
    asked = captions_asked(texts, args.negative, args.weights)
    checker = Checker.load(Path(args.checker), device()) if args.checker else None
    if checker:
        checker.check(asked["caption"])
    cascade = load_cascade(Path(args.model), args.set)
    check_asked(cascade, asked)
    if args.compile:
        compile_networks(cascade)
    controls = controls_of(cascade, args.control)
    asked = {key: [one for one in of for _ in range(args.n)] for key, of in asked.items()}
    captions = [text for text in texts for _ in range(args.n)]
    for one in controls:
        asked |= one.rows(len(captions))
    if args.aspect:
        if controls:
            raise UserError("--aspect and --control: pictures of conditions are square; give one")
        asked |= frame_asked(cascade, args.aspect, len(captions))
    batch = paint(cascade, asked["caption"], args.seed, args.batch, asked)
    pictures = to_uint8(batch[cascade.stages[-1].writes])
    if checker:
        pictures, matched = checker.blackened(pictures)
        count = len(matched) - matched.count(None)
        print(f"{count} of {len(matched)} pictures match {args.checker} and are black")
    out.parent.mkdir(parents=True, exist_ok=True)
    if len(captions) == 1:
        Image.fromarray(pictures[0]).save(out)
    else:
        grid(pictures, columns=min(args.n if args.n > 1 else 4, 8), captions=captions).save(out)
    for key, process in distilled(cascade).items():
        taught = process.steps * process.by
        print(f"{key}: sampled in {process.steps} steps by a stage distilled from {taught}")
    height, width = pictures.shape[1:3]
    size = f"{width} px" if width == height else f"{width} x {height} px"
    print(f"{len(pictures)} pictures of {size}: {out}")
