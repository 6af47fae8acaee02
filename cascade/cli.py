"""`cascade <verb>`: what the command line understands.

Importing torch and lightning costs many seconds, so nothing heavy is imported before a verb runs:
`--help` answers at once. Exit codes: 0 done; 75 stopped behind a checkpoint, run it again; 2 bad
configuration or input; 130 interrupted by hand; 1 anything else.
"""

import argparse
import importlib
import sys

from cascade.errors import Failed, TryAgain, UserError

_EXIT_CODES = {UserError: 2, Failed: 1, TryAgain: 75}

_OVERRIDES = """overrides are Hydra's: group=choice (stage=decoder, net=unet_tiny) or key=value
(data.path=DIR, optim.lr=1e-4); conf/ holds the choices, `cascade train --show stage=decoder` shows
the result"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cascade", description="Train, sample and measure text-to-image cascades."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, epilog=epilog)

    train = verb("train", "Train one stage on shards, or go on with it.", _OVERRIDES)
    train.add_argument("overrides", nargs="*", metavar="override")
    train.add_argument("--show", action="store_true", help="print the configuration, do nothing")

    sample = verb("sample", "Paint captions.")
    sample.add_argument("captions", nargs="*", metavar="caption")
    sample.add_argument("--file", help="a text file with a caption on each line")
    sample.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    sample.add_argument("--n", type=int, default=1, help="pictures per caption (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    sample.add_argument("--out", default="out.png", help="PNG to write (default out.png)")
    sample.add_argument("--overwrite", action="store_true", help="write over an existing --out")
    sample.add_argument("--batch", type=int, default=16, help="pictures at a time (default 16)")
    _sampling_options(sample)

    evaluate = verb("evaluate", "Measure a cascade on held-out captions; write a report.")
    evaluate.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    evaluate.add_argument("--data", required=True, help="folder of shards with held-out splits")
    evaluate.add_argument("--judge", required=True, help="the CLIP that judges: a directory")
    evaluate.add_argument("--out", help="folder for metrics.json and report.html (default: model)")
    evaluate.add_argument("--split", default="val", help="held-out split (default val)")
    evaluate.add_argument("--count", type=int, default=320, help="captions of each kind (320)")
    evaluate.add_argument("--guidance", default="1,2,4", help="decoder's scales to sweep (1,2,4)")
    evaluate.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    _sampling_options(evaluate)

    data = verb("data", "Make shards, or embed them.")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    scenes = kinds.add_parser("scenes", help="write shards of procedural scenes")
    scenes.add_argument("out", help="folder to write to")
    scenes.add_argument("--level", choices=["plain", "full"], default="plain")
    scenes.add_argument("--size", type=int, default=256, help="side in pixels, 16 to 1024 (256)")
    scenes.add_argument("--train", type=int, default=10_000, help="training scenes (10000)")
    scenes.add_argument("--val", type=int, default=1000, help="held-out captions (1000)")
    scenes.add_argument("--unseen", type=int, default=500, help="unseen colour-shape pairs (500)")
    scenes.add_argument("--seed", type=int, default=0)
    embed = kinds.add_parser("precompute", help="write CLIP image embeddings beside shards")
    embed.add_argument("data", help="folder of shards")
    embed.add_argument("--clip", required=True, help="a CLIP: directory, file or open_clip name")
    embed.add_argument("--checkpoint", help="weights file, for an open_clip name")
    embed.add_argument("--out", help="folder to write to (default: DATA/embeddings)")

    describe = verb(
        "describe",
        "Print a network's parameters, and FLOPs and memory of its training, without allocating.",
        "beside overrides (net=imagen_2b, experiment=unclip_decoder, batch=256, micro_batch=16) it "
        "takes gpu_memory=GIB (80) and gpus=NUMBER (8); without stage=... or experiment=... the "
        "network is put into the first stage that it fits",
    )
    describe.add_argument("overrides", nargs="*", metavar="override", help="such as net=unet_tiny")

    demo = verb(
        "demo", "Train a whole cascade from nothing, paint held-out captions, measure, report."
    )
    demo.add_argument("overrides", nargs="*", metavar="override", help="such as budget=smoke")
    return top


def _sampling_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.OPTION=VALUE",
        help="a sampling choice, such as decoder.scale=3, prior.best_of=4 or sr64.steps=8",
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        importlib.import_module(f"cascade.verbs.{args.verb}").main(args)
    except tuple(_EXIT_CODES) as error:
        print(f"cascade: {error}", file=sys.stderr)
        return _EXIT_CODES[type(error)]
    except KeyboardInterrupt:
        print("cascade: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
