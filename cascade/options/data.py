"""Options of `cascade data`."""

import argparse

from cascade.options.shared import named_options


def data_options(data: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `cascade data`."""
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    scenes = kinds.add_parser("scenes", help="write shards of procedural scenes")
    scenes.add_argument("out", help="folder to write to")
    scenes.add_argument(
        "--level", choices=["plain", "full", "written", "language"], default="plain"
    )
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
    scenes.add_argument(
        "--captions-only",
        type=int,
        metavar="N",
        help="write N training captions to OUT/captions.txt, one on each line, and no pictures",
    )
    index = kinds.add_parser("index", help="index where each sample is stored, and find damage")
    index.add_argument("data", help="folder of shards, or its URL in a store (s3://BUCKET/FOLDER)")
    index.add_argument("--index", metavar="DIR", help="folder to write to (default: the shards')")
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
    embed.add_argument(
        "--text", help="language model (directory), T5 or CLIP (or name) that encodes captions"
    )
    embed.add_argument("--captions", default="txt", help="fields, such as txt,long_caption (txt)")
    embed.add_argument("--several", choices=["first", "all"], help="which of a list")
    embed.add_argument(
        "--recaptions", help="folder of `cascade data caption`, whose fields are read"
    )
    named_options(embed)
    embed.add_argument(
        "--raw",
        action="store_true",
        default=None,
        help="keep CLIP's embeddings as they are, without unit norm, as imported stages read them",
    )
    embed.add_argument("--length", type=int, help="number of tokens, but of a CLIP (default 256)")
    embed.add_argument(
        "--padded",
        action="store_true",
        default=None,
        help="keep the states of a T5's padding, up to --length, as DeepFloyd IF reads them",
    )
    embed.add_argument(
        "--bf16", action="store_true", default=None, help="compute in bfloat16, not a CLIP"
    )
    embed.add_argument(
        "--layer",
        type=lambda text: text if text == "mean" else int(text),
        metavar="I|mean",
        help="states of a language model: hidden_states[I], or the mean over all layers (mean)",
    )
    embed.add_argument("--instruction", help="text that a language model reads before captions")
    embed.add_argument("--side", choices=["left", "right"], help="where it pads (right)")
    embed.add_argument("--out", help="folder for embeddings (default: DATA/embeddings)")
    embed.add_argument("--text-out", help="folder for the captions' states (default: DATA/text)")
    embed.add_argument("--workers", type=int, default=0, help="decoding processes (default 0)")

    caption = kinds.add_parser(
        "caption",
        help="describe the pictures of shards with a captioner, for data=recaptioned",
        description="Describe the pictures of shards with BLIP, BLIP-2, Florence-2 or any other "
        "vision-language model of transformers. `cascade train data=recaptioned data.path=DIR` "
        "then trains on these captions for 95%% of the samples, and on the txt for the others.",
        epilog="Any number of processes may share the work on one folder. Each continues with what "
        "the others, or an interrupted run, have not done.",
    )
    caption.set_defaults(module="captioning")
    caption.add_argument("data", help="folder of shards")
    caption.add_argument("--model", required=True, help="folder of the captioner, as published")
    caption.add_argument(
        "--prompt",
        help="what a model that chats is asked, Florence-2's task ('<MORE_DETAILED_CAPTION>'), or "
        "the words that captions of others begin with (default: the model's usual one)",
    )
    caption.add_argument(
        "--samples",
        type=int,
        default=1,
        help="captions of each picture, drawn; training draws one of them (1: the most likely one)",
    )
    caption.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    caption.add_argument(
        "--tags", metavar="PROMPT", help="also ask this, and keep the answer as tags"
    )
    caption.add_argument("--clip", help="CLIP that scores captions: a directory or open_clip name")
    caption.add_argument("--least", type=float, help="leave out captions of a lower score (0.2)")
    caption.add_argument("--batch", type=int, default=16, help="pictures per batch (default 16)")
    caption.add_argument("--tokens", type=int, default=128, help="longest caption (default 128)")
    caption.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    caption.add_argument(
        "--field", default="long_caption", help="name of the captions (default long_caption)"
    )
    caption.add_argument("--out", help="folder for captions (default: DATA/captions)")
    caption.add_argument("--workers", type=int, default=0, help="decoding processes (default 0)")
