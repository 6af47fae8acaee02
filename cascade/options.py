"""Options that several verbs share, and those of `cascade data`."""

import argparse
from typing import Any


def data_options(data: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `cascade data`."""
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    scenes = kinds.add_parser("scenes", help="write shards of procedural scenes")
    scenes.add_argument("out", help="folder to write to")
    scenes.add_argument("--level", choices=["plain", "full"], default="plain")
    scenes.add_argument("--size", type=int, default=256, help="side in pixels, 16 to 1024 (256)")
    scenes.add_argument("--train", type=int, default=10_000, help="training scenes (default 10000)")
    scenes.add_argument("--val", type=int, default=1000, help="held-out scenes (default 1000)")
    scenes.add_argument(
        "--unseen",
        type=int,
        default=500,
        help="held-out scenes of colour-shape pairs that training lacks (default 500)",
    )
    scenes.add_argument("--seed", type=int, default=0)
    index = kinds.add_parser("index", help="index where each sample is stored, and find damage")
    index.add_argument("data", help="folder of shards")
    index.add_argument(
        "--val",
        metavar="SHARE",
        help="hold out this many pictures, such as 1%% or 500, if no tar is named val-* (0: none; "
        "default: as in the existing index)",
    )
    index.add_argument(
        "--keys",
        choices=["first_dot", "last_dot"],
        help="where the key ends in a member's name (default: as in the existing index, or "
        "first_dot)",
    )
    pack = kinds.add_parser("pack", help="write shards from a folder of captioned pictures")
    pack.add_argument("out", help="folder to write to")
    pack.add_argument("--pictures", help="folder of pictures (default: the folder of --captions)")
    pack.add_argument(
        "--captions",
        help=".csv, .tsv, .jsonl or .parquet, or a folder or quoted pattern of its parts (default: "
        "NAME.txt files)",
    )
    pack.add_argument(
        "--lines", action="store_true", help="read each line of NAME.txt as a caption"
    )
    pack.add_argument("--file-column", help="column of files or pictures (default: a common name)")
    pack.add_argument("--caption-columns", help="caption columns; the first becomes the .txt")
    pack.add_argument("--val", default="0.01", help="pictures to hold out, or their share (1%%)")
    pack.add_argument("--size", type=int, help="shrink pictures to this short side, in pixels")
    pack.add_argument("--per-shard", type=int, default=1000, help="pictures per shard (1000)")
    pack.add_argument("--seed", type=int, default=0, help="seed of the order (default 0)")
    embed = kinds.add_parser(
        "precompute",
        help="encode pictures and captions of shards once, with frozen encoders",
        epilog="Any number of processes may share the work on one folder. Each continues with what "
        "the others, or an interrupted run, have not done.",
    )
    embed.add_argument("data", help="folder of shards")
    embed.add_argument("--clip", help="CLIP that embeds pictures: a directory or open_clip name")
    embed.add_argument("--text", help="T5 (directory or name) or CLIP that encodes captions")
    embed.add_argument("--captions", default="txt", help="fields, such as txt,long_caption (txt)")
    embed.add_argument("--several", choices=["first", "all"], help="which of a list")
    named_options(embed)
    embed.add_argument("--length", type=int, help="number of tokens of a T5 (default 256)")
    embed.add_argument("--bf16", action="store_true", default=None, help="run a T5 in bfloat16")
    embed.add_argument("--out", help="folder for embeddings (default: DATA/embeddings)")
    embed.add_argument("--text-out", help="folder for the captions' states (default: DATA/text)")
    embed.add_argument("--workers", type=int, default=0, help="decoding processes (default 0)")


def sampling_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.OPTION=VALUE",
        help="override a sampling choice, such as decoder.scale=3, prior.best_of=4 or sr64.steps=8",
    )


def caption_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--negative",
        metavar="CAPTION",
        help="what guidance leads away from, instead of from nothing; needs a scale other than 1",
    )
    verb.add_argument(
        "--weights",
        action="store_true",
        help=r"read weighted phrases, such as 'a (red:1.3) circle'; \( and \) are brackets",
    )


def named_options(verb: Any) -> None:
    verb.add_argument("--checkpoint", help="weights file or pretrained tag, with an open_clip name")
    verb.add_argument(
        "--quick-gelu",
        type=switch,
        metavar="true|false",
        help="whether the weights need QuickGELU, if nothing else tells",
    )


def switch(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false") from None


def shard_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--shard",
        metavar="I/N",
        help="this process's share of the work, I from 0 (default: from torchrun or srun)",
    )


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
