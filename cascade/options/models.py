"""Options of the verbs that use a trained model."""

import argparse
from typing import Any

from cascade.options.shared import (
    box,
    caption_options,
    checker_option,
    compile_option,
    control_option,
    named_options,
    sampling_options,
    shard_option,
)


def personalize_options(personalize: argparse.ArgumentParser) -> None:
    personalize.add_argument(
        "--method", required=True, choices=["textual_inversion", "dreambooth", "lora"],
        help="train one word, the weights, or changes of low rank to them",
    )  # fmt: skip
    personalize.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    personalize.add_argument("--pictures", required=True, metavar="FOLDER", help="of the thing")
    personalize.add_argument("--token", required=True, help="its name in captions: '<thing>'")
    personalize.add_argument(
        "--class", dest="noun", metavar="WORDS", help="what it is one of, such as 'toy'"
    )
    of = "whose meaning a learned word begins with (default: of --class)"
    personalize.add_argument("--word", help=of)
    of = "stages to train (default: up to the first that paints)"
    personalize.add_argument("--stages", type=lambda text: text.split(","), metavar="A,B", help=of)
    of = "of the class's half of each batch (default 1, but 0 for a learned word)"
    personalize.add_argument("--preserve", type=float, metavar="WEIGHT", help=of)
    of = "captions of its class to paint for that (default: 'a CLASS')"
    personalize.add_argument("--prompts", metavar="FILE", help=of)
    personalize.add_argument("--out", required=True, help="directory of the model to write")
    personalize.add_argument("overrides", nargs="*", metavar="override")


def generate_options(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    generate.add_argument(
        "--prompts", required=True, help=".txt, .jsonl, .csv or .tsv, or coco:DIR (COCO-30k)"
    )
    generate.add_argument("--out", required=True, help="folder to write to")
    generate.add_argument("--layout", choices=["plain", "geneval", "compbench"], default="plain")
    generate.add_argument("--per-prompt", type=int, help="pictures per prompt (by layout 1, 4, 10)")
    generate.add_argument("--seed", type=int, default=0, help="seed of all noise (default 0)")
    generate.add_argument("--batch", type=int, default=16, help="pictures per batch (default 16)")
    shard_option(generate)
    caption_options(generate)
    control_option(generate)
    checker_option(generate)
    compile_option(generate)
    sampling_options(generate)


def evaluate_options(evaluate: argparse.ArgumentParser) -> None:
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory of a cascade (runs/demo)")
    what.add_argument("--pictures", help="folder or tar of pictures, from any system")
    what.add_argument("--config", help="file of a complete evaluation, as launched jobs read it")
    evaluate.add_argument("--data", help="with --model: folder of shards with held-out splits")
    evaluate.add_argument("--judge", help="with --model: directory of the CLIP that judges")
    picture_options(evaluate)
    evaluate.add_argument(
        "--out",
        help="folder of the results (default: --model, or PICTURES.evaluation)",
    )
    evaluate.add_argument("--split", help="held-out split (default val); all: every sample")
    evaluate.add_argument("--count", type=int, help="captions of each kind (default 320)")
    evaluate.add_argument("--guidance", help="decoder's guidance scales to sweep (default 1,2,4)")
    evaluate.add_argument(
        "--geneval",
        type=int,
        metavar="N",
        help="score GenEval's six tasks on scenes, with N prompts each (0: skip)",
    )
    evaluate.add_argument(
        "--bound",
        type=int,
        metavar="STEPS",
        help="also report each stage's variational bound, in bits per dimension, with STEPS steps",
    )
    evaluate.add_argument(
        "--typographic",
        action="store_true",
        default=None,
        help="also write wrong words into pictures: what its CLIP and variations make of them",
    )
    evaluate.add_argument(
        "--edits",
        type=int,
        metavar="N",
        help="also measure `cascade edit` on N pictures of scenes, or of styles (0: skip)",
    )
    evaluate.add_argument(
        "--control",
        type=int,
        metavar="N",
        help="also measure its ControlNets on N scenes (0: skip)",
    )
    evaluate.add_argument("--seed", type=int, help="seed of all noise (default 0)")
    sampling_options(evaluate)


def picture_options(verb: argparse.ArgumentParser) -> None:
    of = verb.add_argument_group("with --pictures")
    of.add_argument("--reference", help="folder, tar, .npz of statistics, or coco:DIR (COCO-30k)")
    of.add_argument("--captions", help=".jsonl, .csv or .txt with ids (default: NAME.txt files)")
    of.add_argument("--inception", metavar="FILE", help="weights of the Inception network of FID")
    of.add_argument("--clip", help="CLIP: a directory, or an open_clip name with --checkpoint")
    named_options(of)
    of.add_argument("--dino", metavar="DIR", help="DINOv2 in the format of transformers")
    of.add_argument(
        "--resize",
        choices=["clean", "pytorch", "tensorflow"],
        help="resizing to Inception's 299 px (default clean); if given, picture sizes may differ",
    )
    of.add_argument("--bootstrap", type=int, help="bootstrap draws for intervals (200; 0: none)")
    of.add_argument("--cache", metavar="DIR", help="folder for features (default: NAME.features)")
    shard_option(verb)


def edit_options(edit: argparse.ArgumentParser) -> None:
    """Adds the kinds of `cascade edit`."""
    kinds = edit.add_subparsers(dest="kind", required=True, metavar="KIND")

    def kind(name: str, text: str, caption: bool = False, fit: bool = True) -> Any:
        of = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        of.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
        of.add_argument("--picture", required=True, nargs="+", metavar="FILE", help="to edit")
        of.add_argument("--out", required=True, help="file to write")
        of.add_argument("--caption", required=caption, help="what the result shows")
        of.add_argument("--n", type=int, default=1, help="results per picture (default 1)")
        of.add_argument("--seed", type=int, default=0, help="seed of all noise (default 0)")
        of.add_argument("--batch", type=int, default=16, help="pictures per batch (default 16)")
        of.add_argument("--overwrite", action="store_true", help="replace an existing --out")
        if fit:
            fits = {"choices": ["crop", "pad"], "default": "crop"}
            of.add_argument("--fit", **fits, help="use the centred square (crop), or all (pad)")
        caption_options(of)
        checker_option(of)
        sampling_options(of)
        return of

    def inverting(of: argparse.ArgumentParser) -> None:
        of.add_argument("--steps", type=int, help="of DDIM, both ways (default 50)")
        of.add_argument("--refine", type=int, metavar="K", help="iterations per inverted step (0)")
        of.add_argument("--scale", type=float, help="of guidance (default 1: none)")

    vary = kind("vary", "paint other pictures of the same CLIP embedding")
    vary.add_argument("--eta", type=float, help="start from the inverted noise; 0 reconstructs")
    inverting(vary)
    interpolate = kind("interpolate", "paint pictures between two or more")
    of_noise = "interpolate the inverted noise (slerp), or keep one (fixed)"
    interpolate.add_argument("--noise", choices=["slerp", "fixed"], default="slerp", help=of_noise)
    change = kind("change", "change a picture by the difference of two captions")
    change.add_argument("--to", required=True, metavar="CAPTION", help="of the desired picture")
    change.add_argument("--from", metavar="CAPTION", help="of the present one (default: nothing)")
    change.add_argument("--share", type=float, default=0.5, help="largest rotation (default 0.5)")
    for of, count in ((interpolate, 7), (change, 5)):
        of.add_argument("--frames", type=int, help=f"pictures of the path (default {count})")
        inverting(of)
    reconstruct = kind("reconstruct", "paint from more and more principal components")
    reconstruct.add_argument("--data", required=True, help="shards with embeddings, for the axes")
    reconstruct.add_argument(
        "--components", type=int, nargs="+", help="numbers (default: doubling)"
    )
    image = kind("image", "noise a picture, and denoise it with a caption", caption=True)
    image.add_argument("--strength", type=float, default=0.6, help="noise level, up to 1 (0.6)")
    inpaint = kind("inpaint", "repaint a part of a picture", caption=True)
    where = inpaint.add_mutually_exclusive_group()
    where.add_argument("--mask", metavar="FILE", help="picture that is white where to repaint")
    where.add_argument("--box", type=box, metavar="X,Y,W,H", help="what to repaint, in pixels")
    outpaint = kind("outpaint", "enlarge a picture", caption=True, fit=False)
    for side in ("left", "right", "top", "bottom"):
        outpaint.add_argument(f"--{side}", type=int, default=0, help="pixels to add (default 0)")
    for of in (inpaint, outpaint):
        of.add_argument("--jumps", type=int, default=5, help="times to take each step (default 5)")


def serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("folders", nargs="+", metavar="RUNS", help="folders of models and runs")
    serve.add_argument("--host", default="127.0.0.1", help="address to answer on (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    serve.add_argument("--memory", default="8G", help="of loaded weights (default 8G)")
    of = "of one request (default 16)"
    serve.add_argument("--most-pictures", type=int, default=16, metavar="N", help=of)
    of = "characters of a caption (default 2000)"
    serve.add_argument("--longest", type=int, default=2000, metavar="N", help=of)
    of = "of a stage's sampler (default 250)"
    serve.add_argument("--most-steps", type=int, default=250, metavar="N", help=of)
