"""The command line, `cascade VERB`.

Importing torch and lightning takes many seconds, so nothing heavy is imported before a verb runs,
and `--help` answers at once. Exit codes: 0 done; 75 stopped after a checkpoint, run it again; 2 bad
configuration or input; 130 interrupted by hand; 1 anything else.
"""

import argparse
import errno
import importlib
import os
import sys
from pathlib import Path

from cascade.config.allowlist import trust
from cascade.errors import Failed, Superseded, TryAgain, UserError
from cascade.files import processors
from cascade.options.data import data_options
from cascade.options.models import (
    edit_options,
    evaluate_options,
    generate_options,
    personalize_options,
    serve_options,
)
from cascade.options.shared import (
    caption_options,
    checker_option,
    compile_option,
    control_option,
    sampling_options,
)
from cascade.runs import done
from cascade.slurm.code import check

_EXIT_CODES = {UserError: 2, Failed: 1, TryAgain: 75, Superseded: 75}

# Errors of the file system that the user can fix.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC}

# Each option here has an effect only together with one of those listed for it.
_NEEDS = {
    "evaluate": {
        **dict.fromkeys(("data", "judge", "split", "count", "guidance"), ("model",)),
        **dict.fromkeys(("geneval", "bound", "typographic", "edits", "control"), ("model",)),
        **dict.fromkeys(("seed", "set"), ("model",)),
        **dict.fromkeys(("reference", "inception", "clip", "dino", "resize"), ("pictures",)),
        **dict.fromkeys(("cache", "shard"), ("pictures",)),
        **dict.fromkeys(("captions", "checkpoint", "quick_gelu"), ("clip",)),
        "bootstrap": ("reference", "inception"),
        "out": ("model", "pictures"),
    },
    "sweep": {"price": ("dry_run",)},
    "vary": dict.fromkeys(("steps", "refine", "scale"), ("eta",)),
    "pack": dict.fromkeys(("file_column", "caption_columns"), ("captions",)),
    "caption": {"least": ("clip",)},
    "precompute": {
        **dict.fromkeys(("checkpoint", "quick_gelu", "raw"), ("clip", "text")),
        **dict.fromkeys(("text_out", "length", "bf16", "padded", "several"), ("text",)),
        **dict.fromkeys(("layer", "instruction", "side", "recaptions"), ("text",)),
        "out": ("clip",),
    },
}

_OVERRIDES = """Overrides are Hydra's: group=choice (stage=decoder, net=unet_tiny) or key=value
(data.path=DIR, optim.lr=1e-4). conf/ holds the choices; `cascade train --show stage=decoder` prints
the result."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cascade", description="Train, sample and measure text-to-image cascades."
    )
    top.set_defaults(module=None)  # of cascade.verbs; None: the verb's own name
    top.add_argument("--code", help=argparse.SUPPRESS)  # digest of the code a launcher froze
    top.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="let configurations call the classes and functions of this Python module of yours, "
        "which runs its code: name only modules whose authors you trust",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, epilog=epilog)

    def overrides(of: argparse.ArgumentParser, text: str | None = None, nargs: str = "*") -> None:
        of.add_argument("overrides", nargs=nargs, metavar="override", help=text)

    train = verb("train", "Train one stage on shards, or resume it.", _OVERRIDES)
    overrides(train)
    train.add_argument("--show", action="store_true", help="print the configuration and exit")
    train.add_argument(
        "--config", help="file of a complete configuration, as launched jobs read it"
    )

    distill = verb(
        "distill",
        "Train a stage to sample in few steps, as a trained one, its teacher, does in many.",
        "Give run=DIR teacher=RUN steps=N, and perhaps images=, lr=, 'choices={scale: 3.0, steps: "
        "16}' (how the teacher samples); conf/distill.yaml holds the defaults. The result is a run "
        "like any other: name it in cascade.yaml with steps: N.",
    )
    overrides(distill, "such as run=runs/fast teacher=runs/demo/decoder steps=4", "+")
    distill.add_argument("--show", action="store_true", help="print the configuration and exit")

    personalize_options(
        verb(
            "personalize",
            "Teach a model a thing of your own from a few pictures of it.",
            "The result is a model like any other; the base is not changed. Each picture may have "
            "a caption, NAME.txt, that says the token. Overrides, such as images=2000 batch=4 "
            "optim.lr=1e-3 kept=200 adapter.rank=16, change conf/personalize.yaml.",
        )
    )

    average = verb(
        "average",
        "Make a run of another average of a run's weights, whose length is chosen afterwards.",
        "RUN was trained with averages=power. The result is a run like any other; the sampling "
        "choice `length` makes the same weights without writing them.",
    )
    average.add_argument("run", metavar="RUN", help="directory of the run")
    average.add_argument(
        "--length",
        type=float,
        required=True,
        help="standard deviation of the average, as a share of the training (0.02 to 0.25)",
    )
    average.add_argument("--out", help="directory of the run to write (default: RUN-LENGTH)")

    bring = verb(
        "import",
        "Make a run of another system's published weights, to sample, fine-tune and evaluate.",
        "KIND is a stage (karlo-prior, karlo-decoder, karlo-sr, glide, glide-upsampler, if-1, "
        "if-2, guided-diffusion, kandinsky-prior, diffusers), or a whole cascade in one folder "
        "(karlo, glide, if): cascade import karlo FOLDER --out runs/karlo. README.md lists the "
        "files of each. Nothing is fetched. Overrides, such as clip.path=DIR "
        "clip.checkpoint=null, change the runs' configuration.",
    )
    bring.add_argument("kind", metavar="KIND", help="the system, and which part of it")
    bring.add_argument("source", metavar="SOURCE", help="file or folder of the weights")
    bring.add_argument("--out", required=True, help="directory of the run or model to write")
    overrides(bring, "of the configuration")
    bring.set_defaults(module="importing")

    launched = (
        "launcher=local runs several tasks at a time on this machine; launcher=slurm submits jobs "
        "and returns. launcher.KEY=VALUE overrides conf/launcher/ (launcher.partition=gpu, "
        "launcher.gpus=8, launcher.at_once=4). Configurations and code are frozen on submission. "
        "Run the same command again to resume unfinished tasks."
    )
    sweep = verb(
        "sweep", "Answer a question by a grid of trainings and samplings (conf/sweep/).", launched
    )
    what = "sweep=NAME, launcher=..., run=DIR (of the sweep), and overrides of every training"
    overrides(sweep, what, "+")
    sweep.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="show what is done, what would run, and for how long, and start nothing",
    )
    sweep.add_argument("--price", type=float, help="of an hour of a GPU (or of this machine)")
    launch = verb("launch", "Train a whole cascade as a chain of jobs (conf/cascade/).", launched)
    what = (
        "cascade=NAME, launcher=..., data.path=DIR, run=DIR, +resources.STAGE.nodes=4, "
        "'+budgets.STAGE=[\"images=...\"]'"
    )
    overrides(launch, what, "+")
    for submitting in (sweep, launch):
        submitting.set_defaults(module="submit")
    measure = verb("measure", "Measure one point of a sweep at every cell (run by `sweep`).")
    measure.add_argument("file", help="the point's evaluation/frozen.yaml")
    # The verb's earlier name, which plans submitted before it changed still use.
    verbs.add_parser("cells", parents=[measure], add_help=False).set_defaults(verb="measure")
    report = verb("report", "Write the page, tables and figures of a sweep, finished or not.")
    report.add_argument("dir", help="folder of a sweep, or of several sweeps")
    report.add_argument("--out", help="folder for pages, tables and figures (default: DIR)")
    report.add_argument(
        "--findings",
        help="page of findings (.md) to update, with its tables in the folder of the same name",
    )
    runs = verb(
        "runs",
        "Show which runs are queued, running, preempted, finished or failed, and their progress.",
    )
    runs.add_argument(
        "folders", nargs="*", default=["runs"], help="folders that contain runs (default: runs)"
    )

    sample = verb("sample", "Paint pictures of captions.")
    sample.add_argument("captions", nargs="*", metavar="caption")
    sample.add_argument("--file", help="file of captions, in any format of generate --prompts")
    sample.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    sample.add_argument("--n", type=int, default=1, help="pictures per caption (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="seed of all noise (default 0)")
    sample.add_argument("--out", default="out.png", help="PNG to write (default out.png)")
    sample.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    sample.add_argument("--batch", type=int, default=16, help="pictures per batch (default 16)")
    sample.add_argument("--aspect", metavar="W:H", help="of pictures (1:1), if trained in buckets")
    caption_options(sample)
    control_option(sample)
    checker_option(sample)
    compile_option(sample)
    sampling_options(sample)

    generate = verb(
        "generate",
        "Paint many prompts into a folder, for `evaluate` or for other scorers.",
        "Run the same command again to resume; any number of processes may share the work.",
    )
    generate_options(generate)

    evaluate = verb(
        "evaluate",
        "Measure a cascade on held-out captions, or the pictures of any system; write a report.",
    )
    evaluate_options(evaluate)

    export = verb("export", "Write a trained cascade as a folder for other machines and programs.")
    export.add_argument("--model", required=True, help="directory of a cascade (runs/demo)")
    export.add_argument(
        "--format",
        choices=["card", "diffusers"],
        default="card",
        help="card: safetensors, encoders and a model card, for any cascade (default); diffusers: "
        "for stages in the layouts of its classes",
    )
    export.add_argument("--out", required=True, help="folder to write; it must not exist")
    export.add_argument("--license", help="of the weights, such as apache-2.0, for the card")

    edit_options(
        verb(
            "edit",
            "Edit pictures with a trained cascade: vary, interpolate, change, repaint, enlarge.",
        )
    )

    serve = verb(
        "serve",
        "Open a page on this machine to paint, edit, compare and watch.",
        "The page is for this machine alone. With --host it is for others too, who are asked for "
        "the password in the environment variable CASCADE_PASSWORD.",
    )
    serve_options(serve)

    data_options(verb("data", "Make, index and embed shards."))

    describe = verb(
        "describe",
        "Print a network's parameters, and the FLOPs and memory of its training; allocate nothing.",
        "In addition to overrides (net=imagen_2b, experiment=unclip_decoder, batch=256, "
        "micro_batch=16), it takes gpu_memory=GIB (80) and gpus=NUMBER (8). Without stage=... or "
        "experiment=..., the network is put into the first stage that it fits.",
    )
    overrides(describe, "such as net=unet_tiny")

    doctor = verb(
        "doctor",
        "Check the installation, shards, runs, models and encoders; tell how to fix each problem.",
        "Exit code 0: no problems; 2: something will fail or give wrong numbers.",
    )
    doctor.add_argument(
        "paths", nargs="*", metavar="PATH", help="shards, a run, a model, an encoder"
    )
    doctor.add_argument("--full", action="store_true", help="check everything; may take long")
    doctor.add_argument(
        "--json", action="store_true", help="print JSON, without user or host names"
    )

    demo = verb(
        "demo", "Train a whole cascade from scratch, sample held-out captions, measure, report."
    )
    overrides(demo, "such as cascade=scenes_cpu or budget=smoke")
    return top


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
                f"{spelled(name)} has no effect without {those}: give {those} as well, or leave "
                f"{spelled(name)} out"
            )


def _line(error: Exception) -> str:
    """An error's message, without the traceback that torch prepends if a data worker raised it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2].strip()


def _told(error: Exception) -> int:
    """Prints an error, and returns its exit code.

    A launcher is told, through a file that it names, that another attempt would fail as well.
    """
    print(f"cascade: {_line(error)}", file=sys.stderr)
    if (path := os.environ.get("CASCADE_FAILURE")) and not isinstance(error, TryAgain):
        Path(path).write_text(f"{_line(error)}\n")
    return next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    top = parser()
    args, rest = top.parse_known_args(argv)
    # argparse does not join the overrides before an option with those after it.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: list[str] | None = None) -> int:
    args = _parsed(argv)
    os.environ.update(processors.settings(os.environ))  # read when a verb imports torch
    args.words = sys.argv[1:] if argv is None else argv
    try:
        if args.code:
            check(args.code)
        _check_needs(args)
        trust(args.trust)
        outputs = importlib.import_module(f"cascade.verbs.{args.module or args.verb}").main(args)
        done.finish(outputs or ())
    except tuple(_EXIT_CODES) as error:
        return _told(error)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        what = f"{error.filename or 'a file'}: {error.strerror}"
        return _told(UserError(f"{what}: check the path, the free space and the permissions"))
    except KeyboardInterrupt:
        print("cascade: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
