"""`cascade data`: shards of procedural scenes; CLIP embeddings beside shards."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cascade.data.corpus import MEND, index_folder, total
from cascade.data.embeddings import MANIFEST
from cascade.data.index import CUT, Summary, counted
from cascade.data.listing import columns, rows_of_table, table, texts_beside, usable
from cascade.data.pack import held_out, pack
from cascade.data.scenes import write_scenes
from cascade.errors import UserError
from cascade.training.callbacks import bar

EMBEDDINGS, TEXT = "embeddings", "text"  # folders beside the shards, as conf/ has them


def main(args: argparse.Namespace) -> Sequence[Path]:
    """Returns what scenes and embeddings have left, as far as a chain waits for it."""
    if args.kind == "scenes":
        if not 16 <= args.size <= 1024:
            raise UserError(f"--size {args.size}: choose 16 to 1024")
        counts = {"train": args.train, "val": args.val, "unseen": args.unseen}
        return make_scenes(Path(args.out), args.level, counts, args.size, args.seed)
    elif args.kind == "index":
        index_shards(Path(args.data))
    elif args.kind == "pack":
        pack_pictures(args)
    else:
        return precompute_rows(args)
    return []


def make_scenes(
    out: Path, level: str, counts: dict[str, int], size: int, seed: int
) -> Sequence[Path]:
    """Writes every split's shards; shards that are there already stay."""
    shards: list[Path] = []
    with bar("scenes", "pictures") as progress:
        task = progress.add_task("", total=sum(counts.values()), rate=0, note="")
        before = 0
        for split, count in counts.items():

            def report(done: int, before: int = before) -> None:
                rate = (before + done) / max(progress.tasks[0].elapsed or 0, 1e-3)
                progress.update(task, completed=before + done, rate=rate)

            shards += write_scenes(out, level, split, count, size, seed, progress=report)
            before += count
    return shards


def precompute_rows(args: argparse.Namespace) -> Sequence[Path]:
    """Writes the rows that were asked for: of pictures, of captions, or both."""
    outputs: list[Path] = []
    data, captions = Path(args.data), [f.strip() for f in args.captions.split(",") if f.strip()]
    if not (args.clip or args.text) or not captions:
        raise UserError("say what to precompute: --clip CLIP, --text ENCODER, and of --captions")
    if args.clip:
        out = Path(args.out) if args.out else data / EMBEDDINGS
        embed(data, args.clip, out, args.checkpoint, captions, args.workers)
        outputs.append(out / MANIFEST)
    if args.text:
        out = Path(args.text_out) if args.text_out else data / TEXT
        encoder = text_encoder(args.text, args.checkpoint, args.length, args.bf16)
        embed_captions(data, encoder, out, captions, args.workers)
        outputs.append(out / MANIFEST)
    return outputs


def embed(
    data: Path,
    clip: str,
    out: Path,
    checkpoint: str | None = None,
    captions: Sequence[str] = ("txt",),
    workers: int = 0,
) -> None:
    """Writes the CLIP image embeddings of the samples that have one of some captions."""
    from cascade.data.precompute import about_pictures, picture_rows, precompute
    from cascade.encoders.clip import FrozenCLIP
    from cascade.verbs.sample import device

    encoder = FrozenCLIP(clip, checkpoint).to(device())
    rows = partial(picture_rows, clip=encoder, captions=captions, workers=workers)
    with shown("embeddings", "shards") as progress:
        precompute(data, out, about_pictures(encoder), rows, progress)


def embed_captions(
    data: Path, encoder: Any, out: Path, captions: Sequence[str], workers: int = 0
) -> None:
    """Writes what a frozen text encoder makes of some caption fields."""
    from cascade.data.precompute import about_captions, caption_rows, precompute
    from cascade.verbs.sample import device

    encoder = encoder.to(device())
    rows = partial(caption_rows, encoder=encoder, captions=captions, workers=workers)
    with shown("text", "shards") as progress:
        precompute(data, out, about_captions(encoder, captions), rows, progress)


def text_encoder(name: str, checkpoint: str | None, length: int | None, bf16: bool) -> Any:
    """The CLIP, or else the T5, of this name or in this directory."""
    from cascade.encoders.clip import FrozenCLIP
    from cascade.encoders.sources import clip_model
    from cascade.encoders.text import FrozenT5

    if clip_model(name) is None:
        return FrozenT5(name, bf16=bf16, **({"length": length} if length else {}))
    if length or bf16:
        raise UserError(f"--length and --bf16 are for a T5: {name} is a CLIP, leave them out")
    return FrozenCLIP(name, checkpoint)


def index_shards(folder: Path) -> None:
    """Indexes a folder of shards, and says what it holds and what is damaged."""
    with shown("index", "tars") as progress:
        summaries, unreadable = index_folder(folder, progress)
    splits: dict[str, list[Summary]] = {}
    for name, summary in summaries.items():
        splits.setdefault(name.rpartition("-")[0], []).append(summary)
    findings = Table("split", "tars", "samples", "with txt", "with json", "GB", "left out")
    for split, found in sorted(splits.items()):
        sums = total(found)
        counts = (len(found), sums.samples, sums.txt, sums.json)
        size = f"{sums.bytes / 1e9:,.2f}"
        findings.add_row(escape(split), *(f"{n:,}" for n in counts), size, counted(sums.left_out))
    Console().print(findings)
    for name, summary in summaries.items():
        if summary.left_out.get(CUT):
            print(f"{folder / name} is {CUT} after {summary.samples} samples: {MEND}")
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{more}: mend or remove it, then index again")
    if not any(summary.samples for summary in summaries.values()):
        raise UserError(f"{folder} has no sample: a picture and a caption, side by side")


def pack_pictures(args: argparse.Namespace) -> None:
    """Packs a folder of pictures into shards, and says what was left out and why."""
    folder, out = Path(args.pictures), Path(args.out)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give that of the pictures")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to write to")
    if min(args.size or 1, args.per_shard) < 1:
        raise UserError("--size and --per-shard: give 1 or more")
    named = _captioned(args) if args.captions else texts_beside(folder)
    with shown("compare", "pictures") as progress:
        rows, refused = usable(folder, named, progress)
    count = len(rows) + sum(map(len, refused.values()))
    if rows:
        val = held_out(args.val, len(rows))
        with shown("pack", "pictures") as progress:
            report = partial(progress, total=len(rows))
            try:
                late = pack(rows, out, val, args.size, args.per_shard, args.seed, report)
            except OSError as error:
                raise UserError(f"cannot write to {out}: {error.strerror}; give it room") from error
        refused = {r: refused.get(r, []) + late.get(r, []) for r in {**refused, **late}}
    lost = sum(map(len, refused.values()))
    summary = Table("left out", "pictures", "such as")
    for reason, names in refused.items():
        summary.add_row(reason, f"{len(names):,}", escape(repr(names[0])[1:-1]))
    if lost:
        Console().print(summary)
    if lost == count:
        raise UserError(f"{folder} has no picture to pack: {lost:,} were left out")
    print(f"{out} holds {count - lost:,} pictures; {lost:,} were left out")


def _captioned(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    rows = table(Path(args.captions))
    given = [name.strip() for name in args.caption_columns.split(",") if name.strip()]
    file, captions = columns(rows, args.file_column, given)
    print(f"files are named by {file!r}, captions by {', '.join(map(repr, captions))}")
    return rows_of_table(rows, file, captions)


@contextmanager
def shown(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the screen, and what to call with (done, total) to move it."""
    with bar(what, unit) as progress:
        task = progress.add_task("", total=1, rate=0, note="")

        def report(done: int, total: int) -> None:
            rate = done / max(progress.tasks[0].elapsed or 0, 1e-3)
            progress.update(task, completed=done, total=total, rate=rate)

        yield report
