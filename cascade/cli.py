"""`cascade <verb>`: what the command line understands.

Importing torch and lightning costs many seconds, so nothing heavy is imported before a verb runs:
`--help` answers at once. Exit codes: 0 done; 75 stopped behind a checkpoint, run it again; 2 bad
configuration or input; 130 interrupted by hand; 1 anything else.
"""

import argparse
import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from cascade import done
from cascade.errors import Failed, Superseded, TryAgain, UserError
from cascade.slurm.code import check

_EXIT_CODES = {UserError: 2, Failed: 1, TryAgain: 75, Superseded: 75}

# What a file system refuses; the user can mend each of these.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC}

# Each option here takes effect only together with one of those listed for it.
_NEEDS = {
    "evaluate": {
        **dict.fromkeys(("data", "judge", "split", "count", "guidance"), ("model",)),
        **dict.fromkeys(("geneval", "seed", "set"), ("model",)),
        **dict.fromkeys(("reference", "inception", "clip", "dino", "resize"), ("pictures",)),
        **dict.fromkeys(("cache", "shard"), ("pictures",)),
        **dict.fromkeys(("captions", "checkpoint", "quick_gelu"), ("clip",)),
        "bootstrap": ("reference", "inception"),
    },
    "pack": dict.fromkeys(("file_column", "caption_columns"), ("captions",)),
    "precompute": {
        **dict.fromkeys(("checkpoint", "quick_gelu"), ("clip", "text")),
        **dict.fromkeys(("text_out", "length", "bf16", "several"), ("text",)),
        "out": ("clip",),
    },
}

_OVERRIDES = """overrides are Hydra's: group=choice (stage=decoder, net=unet_tiny) or key=value
(data.path=DIR, optim.lr=1e-4); conf/ holds the choices, `cascade train --show stage=decoder` shows
the result"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cascade", description="Train, sample and measure text-to-image cascades."
    )
    top.add_argument("--code", help=argparse.SUPPRESS)  # digest of the code a launcher froze
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, epilog=epilog)

    train = verb("train", "Train one stage on shards, or go on with it.", _OVERRIDES)
    train.add_argument("overrides", nargs="*", metavar="override")
    train.add_argument("--show", action="store_true", help="print the configuration, do nothing")
    train.add_argument("--config", help="a whole configuration: a file, as launched jobs read it")

    launched = (
        "launcher=local runs several at a time on this machine, launcher=slurm submits them and "
        "returns; launcher.KEY=VALUE changes what conf/launcher/ says (launcher.partition=gpu, "
        "launcher.gpus=8, launcher.at_once=4). Configurations and code are frozen as they are now. "
        "The same command again goes on with what is missing."
    )
    sweep = verb("sweep", "Train at every point of a grid (conf/sweep/).", launched)
    sweep.add_argument(
        "overrides",
        nargs="+",
        metavar="override",
        help="sweep=NAME, launcher=..., run=DIR (for all), and overrides of each training",
    )
    launch = verb("launch", "Train a whole cascade as a chain of jobs (conf/cascade/).", launched)
    launch.add_argument(
        "overrides",
        nargs="+",
        metavar="override",
        help="cascade=NAME, launcher=..., data.path=DIR, run=DIR, +resources.LINK.nodes=4, "
        "'+budgets.STAGE=[\"images=...\"]'",
    )
    cells = verb("cells", "Measure one point of a sweep at every cell (what `sweep` sends).")
    cells.add_argument("file", help="the point's evaluation/frozen.yaml")
    report = verb("report", "Write the page of a sweep, or of half a sweep, and its figures.")
    report.add_argument("dir", help="folder of a sweep, or of several")
    report.add_argument("--out", help="where pages, tables and figures go (default: DIR)")
    report.add_argument(
        "--findings", help="page of findings (.md) to bring up to date; its tables lie beside it"
    )
    runs = verb(
        "runs", "Show what is queued, running, preempted, finished or failed, and how far it is."
    )
    runs.add_argument("folders", nargs="*", default=["runs"], help="with runs in them (runs)")

    sample = verb("sample", "Paint captions.")
    sample.add_argument("captions", nargs="*", metavar="caption")
    sample.add_argument("--file", help="captions, in any form that generate --prompts reads")
    sample.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    sample.add_argument("--n", type=int, default=1, help="pictures per caption (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    sample.add_argument("--out", default="out.png", help="PNG to write (default out.png)")
    sample.add_argument("--overwrite", action="store_true", help="write over an existing --out")
    sample.add_argument("--batch", type=int, default=16, help="pictures at a time (default 16)")
    _sampling_options(sample)

    generate = verb(
        "generate",
        "Paint many prompts into a folder, to be measured there or by others' scorers.",
        "the same command again goes on; any number of processes may share the work",
    )
    generate.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    generate.add_argument(
        "--prompts", required=True, help=".txt, .jsonl, .csv or .tsv, or coco:DIR (COCO-30k)"
    )
    generate.add_argument("--out", required=True, help="folder to write to")
    generate.add_argument("--layout", choices=["plain", "geneval", "compbench"], default="plain")
    generate.add_argument(
        "--per-prompt", type=int, help="pictures (default: the layout's: 1, 4, 10)"
    )
    generate.add_argument("--seed", type=int, default=0, help="of all noise (default 0)")
    generate.add_argument("--batch", type=int, default=16, help="pictures at a time (default 16)")
    _shard_option(generate)
    _sampling_options(generate)

    evaluate = verb(
        "evaluate",
        "Measure a cascade on held-out captions, or pictures of any system; write a report.",
    )
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="directory of a cascade (runs/demo)")
    what.add_argument("--pictures", help="folder or tar of pictures, by whatever system")
    evaluate.add_argument("--data", help="of --model: folder of shards with held-out splits")
    evaluate.add_argument("--judge", help="of --model: the CLIP that judges, a directory")
    _picture_options(evaluate)
    evaluate.add_argument(
        "--out", help="folder for numbers and report.html (default: model, PICTURES.evaluation)"
    )
    evaluate.add_argument("--split", help="held-out split (val); all: everything")
    evaluate.add_argument("--count", type=int, help="captions of each kind (320)")
    evaluate.add_argument("--guidance", help="decoder's scales to sweep (1,2,4)")
    evaluate.add_argument(
        "--geneval",
        type=int,
        metavar="N",
        help="score GenEval's six tasks on scenes, with N prompts each (0: leave it out)",
    )
    evaluate.add_argument("--seed", type=int, help="of all noise (default 0)")
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
    index = kinds.add_parser("index", help="note where each sample lies, and find damage")
    index.add_argument("data", help="folder of shards")
    index.add_argument(
        "--val",
        metavar="SHARE",
        help="hold out this many pictures, such as 1%% or 500, if no tar is named val-* (0: none; "
        "default: keep what the index says)",
    )
    index.add_argument(
        "--keys",
        choices=["first_dot", "last_dot"],
        help="where the key ends in a member's name (default: keep what the index says, or "
        "first_dot)",
    )
    pack = kinds.add_parser("pack", help="write shards of a folder of pictures with captions")
    pack.add_argument("out", help="folder to write to")
    pack.add_argument("--pictures", help="folder of files (default: that of --captions)")
    pack.add_argument(
        "--captions",
        help=".csv, .tsv, .jsonl or .parquet, or a folder or quoted pattern of its parts (default: "
        "NAME.txt files)",
    )
    pack.add_argument(
        "--lines", action="store_true", help="treat each line of NAME.txt as a separate caption"
    )
    pack.add_argument("--file-column", help="of names or pictures (default: by common names)")
    pack.add_argument("--caption-columns", help="the first is the sample's .txt")
    pack.add_argument("--val", default="0.01", help="pictures held out, or their share (1%%)")
    pack.add_argument("--size", type=int, help="make larger pictures smaller, to this short side")
    pack.add_argument("--per-shard", type=int, default=1000, help="pictures in a shard (1000)")
    pack.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    embed = kinds.add_parser(
        "precompute",
        help="write what frozen encoders make of shards beside them",
        epilog="any number of processes may share the work on one folder; each goes on with what "
        "others, or a killed call, left undone",
    )
    embed.add_argument("data", help="folder of shards")
    embed.add_argument("--clip", help="embeds pictures: a CLIP's directory, or open_clip's name")
    embed.add_argument("--text", help="encodes captions: a T5's directory or name, or a CLIP")
    embed.add_argument("--captions", default="txt", help="fields, such as txt,long_caption (txt)")
    embed.add_argument(
        "--several", choices=["first", "all"], help="of a list of captions (as data.several)"
    )
    _named_options(embed)
    embed.add_argument("--length", type=int, help="tokens that a T5 reads (default 256)")
    embed.add_argument("--bf16", action="store_true", default=None, help="compute a T5 in bfloat16")
    embed.add_argument("--out", help="folder of the embeddings (default: DATA/embeddings)")
    embed.add_argument("--text-out", help="folder of the captions' states (default: DATA/text)")
    embed.add_argument("--workers", type=int, default=0, help="processes that decode (default 0)")

    describe = verb(
        "describe",
        "Print a network's parameters, and FLOPs and memory of its training, without allocating.",
        "beside overrides (net=imagen_2b, experiment=unclip_decoder, batch=256, micro_batch=16) it "
        "takes gpu_memory=GIB (80) and gpus=NUMBER (8); without stage=... or experiment=... the "
        "network is put into the first stage that it fits",
    )
    describe.add_argument("overrides", nargs="*", metavar="override", help="such as net=unet_tiny")

    doctor = verb(
        "doctor",
        "Check the installation, shards, runs, models and encoders; say how to fix each problem.",
        "exit code 0: no problems; 2: something will fail or give wrong numbers",
    )
    doctor.add_argument(
        "paths", nargs="*", metavar="PATH", help="folder of shards, run, model or encoder"
    )
    doctor.add_argument(
        "--full", action="store_true", help="check everything, however long it takes"
    )
    doctor.add_argument(
        "--json", action="store_true", help="print JSON, without names of users and machines"
    )

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


def _named_options(verb: Any) -> None:
    verb.add_argument("--checkpoint", help="weights file or tag, for a name of open_clip's")
    verb.add_argument(
        "--quick-gelu",
        type=_switch,
        metavar="true|false",
        help="the activation of a file of weights, where nothing else says it",
    )


def _switch(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false") from None


def _shard_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--shard",
        metavar="I/N",
        help="this process's share, I from 0 (default: torchrun's, srun's)",
    )


def _picture_options(verb: argparse.ArgumentParser) -> None:
    of = verb.add_argument_group("of --pictures")
    of.add_argument("--reference", help="folder, tar, .npz of statistics, or coco:DIR (COCO-30k)")
    of.add_argument("--captions", help=".jsonl, .csv or .txt with ids (default: beside pictures)")
    of.add_argument("--inception", metavar="FILE", help="weights of the FID's Inception")
    of.add_argument("--clip", help="a CLIP: a directory, or open_clip's name with --checkpoint")
    _named_options(of)
    of.add_argument("--dino", metavar="DIR", help="a DINOv2 in transformers' format")
    of.add_argument(
        "--resize",
        choices=["clean", "pytorch", "tensorflow"],
        help="to Inception's 299 px (clean); given, pictures may be of several sizes",
    )
    of.add_argument("--bootstrap", type=int, help="draws for intervals (200; 0: none)")
    of.add_argument("--cache", metavar="DIR", help="of features (default: NAME.features)")
    _shard_option(verb)


def _check_needs(args: argparse.Namespace) -> None:
    """Raises UserError if a given option would have no effect."""

    def given(name: str) -> bool:
        return getattr(args, name) not in (None, [])

    def spelled(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    for name, needed in _NEEDS.get(getattr(args, "kind", args.verb), {}).items():
        if given(name) and not any(map(given, needed)):
            those = " or ".join(map(spelled, needed))
            raise UserError(
                f"{spelled(name)} is for {those}, and would be ignored: give {those} as well, or "
                f"leave {spelled(name)} out"
            )


def _line(error: Exception) -> str:
    """What it says, without the traceback that torch adds to it when a data worker raised it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2].strip()


def _note(error: Exception) -> None:
    """Tells a launcher, wherever it looks for it, that another attempt would end the same way."""
    if (path := os.environ.get("CASCADE_FAILURE")) and not isinstance(error, TryAgain):
        Path(path).write_text(f"{_line(error)}\n")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    try:
        if args.code:
            check(args.code)
        _check_needs(args)
        outputs = importlib.import_module(f"cascade.verbs.{args.verb}").main(args)
        done.finish(outputs or ())
    except tuple(_EXIT_CODES) as error:
        print(f"cascade: {_line(error)}", file=sys.stderr)
        _note(error)
        return next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        what = f"{error.filename or 'a file'}: {error.strerror}"
        refused = UserError(f"{what}: check the place, its room and its permissions")
        print(f"cascade: {refused}", file=sys.stderr)
        _note(refused)
        return _EXIT_CODES[UserError]
    except KeyboardInterrupt:
        print("cascade: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
