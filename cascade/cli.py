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

from cascade.errors import Failed, TryAgain, UserError

_EXIT_CODES = {UserError: 2, Failed: 1, TryAgain: 75}

# By a disk or its owner, of whatever place a command was given.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC}

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
    sample.add_argument("--file", help="a text file with a caption on each line")
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
    evaluate.add_argument("--split", default="val", help="held-out split (default val)")
    evaluate.add_argument("--count", type=int, default=320, help="captions of each kind (320)")
    evaluate.add_argument("--guidance", default="1,2,4", help="decoder's scales to sweep (1,2,4)")
    evaluate.add_argument(
        "--geneval",
        type=int,
        default=0,
        metavar="N",
        help="score GenEval's six tasks on scenes, with N prompts each (0: leave it out)",
    )
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
    index = kinds.add_parser("index", help="note where each sample lies, and find damage")
    index.add_argument("data", help="folder of shards")
    pack = kinds.add_parser("pack", help="write shards of a folder of pictures with captions")
    pack.add_argument("out", help="folder to write to")
    pack.add_argument("--pictures", required=True, help="folder of JPEG, PNG and WebP files")
    pack.add_argument("--captions", help=".csv, .tsv, .jsonl or .parquet (default: NAME.txt files)")
    pack.add_argument("--file-column", help="column of file names (default: by common names)")
    pack.add_argument("--caption-columns", default="", help="the first is the sample's .txt")
    pack.add_argument("--val", default="0.01", help="pictures held out, or their share (0.01)")
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
    embed.add_argument("--checkpoint", help="weights file or tag, for a name of open_clip's")
    embed.add_argument("--length", type=int, help="tokens that a T5 reads (default 256)")
    embed.add_argument("--bf16", action="store_true", help="compute a T5 in bfloat16")
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
    of.add_argument("--checkpoint", help="weights file or tag, for a name of open_clip's")
    of.add_argument("--dino", metavar="DIR", help="a DINOv2 in transformers' format")
    of.add_argument(
        "--resize",
        choices=["clean", "pytorch", "tensorflow"],
        help="to Inception's 299 px (clean); given, pictures may be of several sizes",
    )
    of.add_argument("--bootstrap", type=int, default=200, help="draws for intervals (200; 0: none)")
    of.add_argument("--cache", metavar="DIR", help="of features (default: NAME.features)")
    _shard_option(verb)


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
        importlib.import_module(f"cascade.verbs.{args.verb}").main(args)
    except tuple(_EXIT_CODES) as error:
        print(f"cascade: {_line(error)}", file=sys.stderr)
        _note(error)
        return _EXIT_CODES[type(error)]
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
