"""`cascade generate`: pictures of many prompts, by any number of processes, to be measured."""

import argparse
from pathlib import Path

from cascade.errors import UserError
from cascade.eval import coco, prompts
from cascade.eval.generation import Job, generate
from cascade.eval.identity import described
from cascade.eval.prompts import LAYOUTS, Prompt
from cascade.eval.share import share, whole
from cascade.files import check_writable
from cascade.verbs.data import shown
from cascade.verbs.sample import checked, load_cascade


def main(args: argparse.Namespace) -> None:
    layout, shard = LAYOUTS[args.layout], share(args.shard)
    found = read_prompts(args.prompts)
    checked([prompt.text for prompt in found])
    per_prompt = layout.per_prompt if args.per_prompt is None else args.per_prompt
    job = Job(Path(args.out), found, layout, per_prompt, args.seed, args.batch)
    check_writable(job.out, "choose another --out")
    cascade = load_cascade(Path(args.model), args.set)
    if not cascade.stages[-1].writes.startswith("image_"):
        raise UserError(f"{args.model} paints no pictures: add its decoder to cascade.yaml")
    model = {"weights": "EMA", **described(cascade)}  # a run's weights are those of the average
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


def read_prompts(given: str) -> list[Prompt]:
    """Those of a file, or of a copy of COCO (`coco:DIR`)."""
    if given.startswith(coco.PREFIX):
        return coco.prompts(Path(given.removeprefix(coco.PREFIX)))
    return prompts.read(Path(given))
