"""`cascade generate`: sample pictures of many prompts, by any number of processes."""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

from cascade.batch import image_size
from cascade.errors import UserError, explained
from cascade.eval.pictures import coco, generation, prompts
from cascade.eval.pictures.identity import MANIFEST, identity
from cascade.eval.pictures.share import share, whole
from cascade.files.atomic import check_writable
from cascade.files.stores.cache import folder
from cascade.files.stores.places import Remote, place, upload
from cascade.runs.checker import Checker
from cascade.runs.control import controls_of
from cascade.runs.model import captions_asked, check_asked, compile_networks, device, load_cascade
from cascade.runs.progress import shown


def _room(out: Remote) -> Path:
    """Return the local folder of what is copied to a store, so that the same command resumes."""
    room = folder().with_name(f"{folder().name}-generated")
    return room / hashlib.sha256(out.url.encode()).hexdigest()[:16]


def main(args: argparse.Namespace) -> None:
    layout, shard = prompts.LAYOUTS[args.layout], share(args.shard)
    found = coco.prompts_of(args.prompts)
    asked = captions_asked([prompt.text for prompt in found], args.negative, args.weights)
    per_prompt = layout.per_prompt if args.per_prompt is None else args.per_prompt
    out = place(args.out)
    here = _room(out) if isinstance(out, Remote) else out
    job = generation.Job(
        *(here, found, layout, per_prompt, args.seed, args.batch),
        negative=args.negative,
        weights=args.weights,
        checker=Checker.load(Path(args.checker), device()) if args.checker else None,
    )
    if job.checker:
        job.checker.check(asked["caption"])
    check_writable(job.out, "choose another --out")
    cascade = load_cascade(Path(args.model), args.set)
    check_asked(cascade, asked)
    if args.compile:
        compile_networks(cascade)
    job = replace(job, controls=controls_of(cascade, args.control))
    if image_size(cascade.stages[-1].writes) is None:
        raise UserError(f"{args.model} paints no pictures: add its decoder to cascade.yaml")
    model = identity(cascade, job.out)
    written = explained(f"cannot write to {job.out}", "; give it room")
    with written, shown("generate", "pictures") as progress:
        missing = generation.generate(cascade, job, model, shard, progress)
    if isinstance(out, Remote):
        upload(job.out, out, last=MANIFEST)
    count = len(job.items)
    if missing:
        print(
            f"{count - missing:,} of {count:,} pictures are in {out}; {missing:,} are of other "
            f"shards than {shard[0]}/{shard[1]}. What nobody makes, this does: {whole(args)}"
        )
    else:
        print(f"all {count:,} pictures are in {out}, and no others")
        if job.checker:
            print(f"{generation.blackened(job):,} of them match {args.checker} and are black")
