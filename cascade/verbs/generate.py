"""`cascade generate`: sample pictures of many prompts, by any number of processes."""

import argparse
from pathlib import Path

from cascade.batch import image_size
from cascade.errors import UserError
from cascade.eval.pictures.coco import prompts_of
from cascade.eval.pictures.generation import Job, generate, identity
from cascade.eval.pictures.prompts import LAYOUTS
from cascade.eval.pictures.share import share, whole
from cascade.files.atomic import check_writable
from cascade.runs.model import check_captions, load_cascade
from cascade.runs.progress import shown


def main(args: argparse.Namespace) -> None:
    layout, shard = LAYOUTS[args.layout], share(args.shard)
    found = prompts_of(args.prompts)
    check_captions([prompt.text for prompt in found])
    per_prompt = layout.per_prompt if args.per_prompt is None else args.per_prompt
    job = Job(Path(args.out), found, layout, per_prompt, args.seed, args.batch)
    check_writable(job.out, "choose another --out")
    cascade = load_cascade(Path(args.model), args.set)
    if image_size(cascade.stages[-1].writes) is None:
        raise UserError(f"{args.model} paints no pictures: add its decoder to cascade.yaml")
    model = identity(cascade, job.out)
    try:
        with shown("generate", "pictures") as progress:
            missing = generate(cascade, job, model, shard, progress)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write to {job.out}: {why}; give it room") from error
    count = len(job.items)
    if missing:
        print(
            f"{count - missing:,} of {count:,} pictures are in {job.out}; {missing:,} are of other "
            f"shards than {shard[0]}/{shard[1]}. What nobody makes, this does: {whole(args)}"
        )
    else:
        print(f"all {count:,} pictures are in {job.out}, and no others")
