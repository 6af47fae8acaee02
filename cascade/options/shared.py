"""Options that several verbs share, and their types."""

import argparse
from typing import Any


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


def compile_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first, which takes minutes and pays for thousands of pictures",
    )


def control_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=FILE[:WEIGHT]",
        help="steer stages by a picture of edges, depth, ..., for which they have a ControlNet",
    )


def checker_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--checker",
        metavar="FILE",
        help="YAML file of concepts: refuse prompts, and blacken pictures, that match one",
    )


def named_options(verb: Any) -> None:
    verb.add_argument("--checkpoint", help="weights file or pretrained tag, with an open_clip name")
    verb.add_argument(
        "--quick-gelu",
        type=switch,
        metavar="true|false",
        help="whether the weights need QuickGELU, if nothing else tells",
    )


def shard_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--shard",
        metavar="I/N",
        help="this process's share of the work, I from 0 (default: from torchrun or srun)",
    )


def box(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(",") if part.strip().lstrip("-").isdigit())
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: give x,y,w,h in pixels")
    return numbers


def switch(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false") from None
