"""`cascade data`: write scenes, index or pack shards, precompute embeddings."""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cascade.data.embeddings import EMBEDDINGS, MANIFEST, TEXT
from cascade.data.recaptions.reading import COMMAND, recaptions_of
from cascade.data.scenes.generate import write_captions, write_scenes
from cascade.data.tars.corpus import MEND
from cascade.data.tars.dataset import index_folder, total
from cascade.data.tars.index import CUT, Summary, counted, remedy
from cascade.data.tars.keys import CAPTIONS, DOTTED, REMEDY
from cascade.data.tars.listing import Row, captioned_by_files, usable
from cascade.data.tars.pack import held_out, pack
from cascade.data.tars.splits import HELD_OUT, split_of
from cascade.errors import UserError, explained
from cascade.files.atomic import check_writable
from cascade.files.stores.places import Place, on_disk, place
from cascade.formats.parquet import Stored
from cascade.formats.tables import Caption, as_one, columns, rows_of_table, table
from cascade.formats.texts import brief
from cascade.runs.progress import shown

NO_SPLIT = "none by name"


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Run one kind of work; return the files that scenes and embeddings wrote, for job chains."""
    if args.kind == "scenes":
        if not 16 <= args.size <= 1024:
            raise UserError(f"--size {args.size}: choose 16 to 1024")
        if args.captions_only is not None:
            return [make_captions(Path(args.out), args.level, args.captions_only, args.seed)]
        counts = {"train": args.train, "val": args.val, "unseen": args.unseen}
        out = on_disk(args.out, "scenes are written and read")
        return make_scenes(out, args.level, counts, args.size, args.seed)
    elif args.kind == "index":
        index_shards(place(args.data), args.keys, args.val, args.index and place(args.index))
    elif args.kind == "pack":
        pack_pictures(args)
    else:
        return precompute_rows(args)
    return []


def make_scenes(
    out: Path, level: str, counts: dict[str, int], size: int, seed: int
) -> Sequence[Path]:
    """Write every split's shards; existing shards are kept."""
    shards: list[Path] = []
    before, total = 0, sum(counts.values())
    with shown("scenes", "pictures") as progress:
        for split, count in counts.items():

            def report(done: int, before: int = before) -> None:
                progress(before + done, total)

            shards += write_scenes(out, level, split, count, size, seed, progress=report)
            before += count
    return shards


def make_captions(out: Path, level: str, count: int, seed: int) -> Path:
    """Write a corpus of captions; return its file. UserError if another one is there."""
    if count < 1:
        raise UserError(f"--captions-only {count}: give 1 or more")
    path = out / "captions.txt"
    if path.exists():
        raise UserError(f"{path} exists: choose another folder, or remove it")
    check_writable(out)
    write_captions(path, level, count, seed)
    return path


def precompute_rows(args: argparse.Namespace) -> Sequence[Path]:
    """Precompute the rows of pictures, of captions, or both."""
    outputs: list[Place] = []
    data, captions = place(args.data), [f.strip() for f in args.captions.split(",") if f.strip()]
    if not (args.clip or args.text) or not captions:
        raise UserError("choose what to precompute: --clip CLIP or --text ENCODER, and --captions")
    named = _named(args)
    raw = {"unit": False} if args.raw else {}
    if args.clip:
        out = place(args.out) if args.out else data / EMBEDDINGS
        embed(data, args.clip, out, named.get(args.clip, {}) | raw, captions, args.workers)
        outputs.append(out / MANIFEST)
    if args.text:
        from cascade.data.precompute import about_captions, caption_rows, precompute
        from cascade.runs.model import device

        out = place(args.text_out) if args.text_out else data / TEXT
        encoder = text_encoder(args, named.get(args.text, {}) | raw).to(device())
        recaptions = recaptions_of(args.recaptions, captions)
        if args.recaptions and recaptions is None:
            raise UserError(f"{args.recaptions} holds no captions: {COMMAND} first")
        about = about_captions(encoder, captions, args.several, out, recaptions)
        rows = partial(caption_rows, encoder=encoder, captions=captions, several=args.several)
        rows = partial(rows, recaptions=recaptions)
        with shown("text", "shards") as progress:
            precompute(data, out, about, partial(rows, workers=args.workers), progress)
        outputs.append(out / MANIFEST)
    return [output for output in outputs if isinstance(output, Path)]


def _named(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options for CLIPs given by open_clip's names. UserError if none is."""
    from cascade.encoders.sources import clip_model

    options = {"checkpoint": args.checkpoint, "quick_gelu": args.quick_gelu}
    given = {key: value for key, value in options.items() if value is not None}
    models = [model for model in (args.clip, args.text) if model]
    names = [model for model in models if not Path(model).is_dir() and clip_model(model)]
    if given and not names:
        raise UserError(
            f"--{next(iter(given)).replace('_', '-')} is for a name of open_clip's, such as "
            f"ViT-L-14, and would be ignored with {' and '.join(models)}: omit it"
        )
    return dict.fromkeys(names, given)


def embed(
    data: Place,
    clip: str,
    out: Place,
    named: Mapping[str, Any] | None = None,
    captions: Sequence[str] = ("txt",),
    workers: int = 0,
) -> None:
    """Write the CLIP image embeddings of the samples that have a caption.

    Args:
        named: checkpoint and activation, for a CLIP given by open_clip's name.
        captions: the caption fields, one of which a sample must have.
    """
    from cascade.data.precompute import about_pictures, picture_rows, precompute
    from cascade.encoders.clip import FrozenCLIP
    from cascade.runs.model import device

    encoder = FrozenCLIP(clip, **(named or {})).to(device())
    rows = partial(picture_rows, clip=encoder, captions=captions, workers=workers)
    with shown("embeddings", "shards") as progress:
        precompute(data, out, about_pictures(encoder, out), rows, progress)


def text_encoder(args: argparse.Namespace, named: Mapping[str, Any]) -> Any:
    """Load the CLIP, the language model, or else the T5, of this name or in this directory."""
    from cascade.encoders.clip import FrozenCLIP
    from cascade.encoders.llm import FrozenLLM
    from cascade.encoders.published.language_models import is_language_model
    from cascade.encoders.sources import clip_model
    from cascade.encoders.text import FrozenT5

    both, t5, llm = ("length", "bf16"), ("padded",), ("layer", "instruction", "side")
    given = {o: v for o in (*both, *t5, *llm) if (v := getattr(args, o)) is not None}
    if is_language_model(Path(args.text)):
        kind, what, takes, more = FrozenLLM, "a language model", {*both, *llm}, given
    elif clip_model(args.text) is None:
        kind, what, takes, more = FrozenT5, "a T5", {*both, *t5}, given
    else:
        kind, what, takes, more = FrozenCLIP, "a CLIP", set(), named
    if wrong := [option for option in given if option not in takes]:
        raise UserError(f"--{wrong[0]} is not for {what}, which {args.text} is: omit it")
    if args.raw and not args.clip and kind is not FrozenCLIP:
        raise UserError(f"--raw is for a CLIP: {args.text} is {what}, omit it")
    return kind(args.text, **more)


def index_shards(
    folder: Place, keys: str | None = None, val: str | None = None, out: Place | None = None
) -> None:
    """Index a folder of shards, into `out` or itself, and report its content and damage."""
    if isinstance(out or folder, Path):
        check_writable(out or folder, "give another folder with --index, and as +data.index=")
    with shown("index", "tars") as progress:
        dataset, unreadable = index_folder(folder, progress, keys, val, out)
    splits: dict[str, list[Summary]] = {}
    for name, summary in dataset.tars.items():
        splits.setdefault(split_of(Path(name).stem) or NO_SPLIT, []).append(summary)
    names = ("split", "tars", "samples", "held out", "with txt", "with json", "GB", "left out")
    findings = Table(*names)
    for split, found in sorted(splits.items()):
        sums = total(found)
        counts = (len(found), sums.samples, sums.usable(set(CAPTIONS), HELD_OUT))
        counts += (sums.txt, sums.json)
        size, left_out = f"{sums.bytes / 1e9:,.2f}", counted(sums.left_out, sums.such_as)
        findings.add_row(split, *(f"{n:,}" for n in counts), size, escape(left_out))
    Console().print(findings)
    for name, summary in dataset.tars.items():
        if summary.left_out.get(CUT):
            print(f"{folder / name} is {CUT} after {summary.samples} samples: {MEND}")
    sums = total(dataset.tars.values())
    if dotted := sums.left_out.get(DOTTED):
        print(f"{dotted:,} samples such as {sums.such_as[DOTTED]} are left out: {REMEDY}")
    if not dataset.held_out and HELD_OUT not in splits:
        again = remedy(folder, out)[4:-1]
        print(f"nothing is held out: {again} --val 1%` holds pictures out")
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}: repair or remove it, then index again")
    if not sums.samples:
        raise UserError(f"{folder} has no sample: a picture and a caption with the same key")


def pack_pictures(args: argparse.Namespace) -> None:
    """Pack a folder of pictures into shards, and report what was left out and why."""
    out = place(args.out)
    if not (args.pictures or args.captions):
        raise UserError("choose what to pack: --pictures FOLDER, or --captions TABLE with pictures")
    listed = Path(args.captions or "")
    folder = Path(args.pictures or (listed if listed.is_dir() else listed.parent))
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of the pictures")
    if isinstance(out, Path):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: give a folder to write to")
        check_writable(out)
    if min(args.size or 1, args.per_shard) < 1:
        raise UserError("--size and --per-shard: give 1 or more")
    if args.lines and args.captions:
        raise UserError("--lines is for NAME.txt files: omit it or --captions")
    named = _captioned(args) if args.captions else captioned_by_files(folder)
    with shown("compare", "pictures") as progress:
        rows, refused = usable(folder, named, progress)
    if not (args.captions or args.lines):
        rows = _joined(rows)
    count = len(rows) + sum(map(len, refused.values()))
    if rows:
        val = held_out(args.val, len(rows))
        with shown("pack", "pictures") as progress:
            report = partial(progress, total=len(rows))
            with explained(f"cannot write to {out}", "; make room"):
                late = pack(rows, out, val, args.size, args.per_shard, args.seed, report)
        refused = {r: refused.get(r, []) + late.get(r, []) for r in {**refused, **late}}
    lost = sum(map(len, refused.values()))
    summary = Table("left out", "pictures", "such as")
    for reason, names in refused.items():
        summary.add_row(reason, f"{len(names):,}", escape(brief(names[0])))
    if lost:
        Console().print(summary)
    if lost == count:
        raise UserError(f"{folder} has no picture to pack: {lost:,} were left out")
    print(f"{out} holds {count - lost:,} pictures; {lost:,} were left out")
    if lists := sorted({c for row in rows for c, t in row.captions.items() if isinstance(t, list)}):
        print(
            f"some have several captions in {', '.join(lists)}, the first of which is the .txt: "
            f"'+data.captions={{{lists[0]}: 1}}' +data.several=drawn trains on one at a time"
        )


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Join the lines of each text into one caption, and print a note if there are several."""
    if several := sum(isinstance(row.captions["caption"], list) for row in rows):
        print(
            f"{several:,} texts have several lines, which are used as one caption: with --lines "
            "each line is a caption of its own"
        )
    return [row._replace(captions={"caption": as_one(row.captions["caption"])}) for row in rows]


def _captioned(args: argparse.Namespace) -> Iterator[tuple[str | Stored, dict[str, Caption]]]:
    out = place(args.out)
    near = out if isinstance(out, Path) else Path(tempfile.gettempdir()) / "spill"
    room = next(parent for parent in near.absolute().parents if parent.is_dir())
    rows = table(Path(args.captions), spill=room)
    given = [name.strip() for name in (args.caption_columns or "").split(",") if name.strip()]
    file, captions = columns(rows, args.file_column, given)
    print(f"pictures are found by {file!r}, captions by {', '.join(map(repr, captions))}")
    return rows_of_table(rows, file, captions)
