"""`cascade data`: shards of procedural scenes; CLIP embeddings beside shards."""

import argparse
from pathlib import Path

from cascade.data.scenes import write_scenes
from cascade.errors import UserError
from cascade.training.callbacks import bar

EMBEDDINGS = "embeddings"  # the folder beside the shards, as conf/stage has it


def main(args: argparse.Namespace) -> None:
    if args.kind == "scenes":
        if not 16 <= args.size <= 1024:
            raise UserError(f"--size {args.size}: choose 16 to 1024")
        counts = {"train": args.train, "val": args.val, "unseen": args.unseen}
        make_scenes(Path(args.out), args.level, counts, args.size, args.seed)
    else:
        out = Path(args.out) if args.out else Path(args.data) / EMBEDDINGS
        embed(Path(args.data), args.clip, out, args.checkpoint)


def make_scenes(out: Path, level: str, counts: dict[str, int], size: int, seed: int) -> None:
    """Writes every split's shards; shards that are there already stay."""
    with bar("scenes", "pictures") as progress:
        task = progress.add_task("", total=sum(counts.values()), rate=0, note="")
        before = 0
        for split, count in counts.items():

            def report(done: int, before: int = before) -> None:
                rate = (before + done) / max(progress.tasks[0].elapsed or 0, 1e-3)
                progress.update(task, completed=before + done, rate=rate)

            write_scenes(out, level, split, count, size, seed, progress=report)
            before += count


def embed(data: Path, clip: str, out: Path, checkpoint: str | None = None) -> None:
    """Writes the CLIP image embeddings of a folder of shards."""
    from cascade.data.precompute import precompute
    from cascade.encoders.clip import FrozenCLIP
    from cascade.verbs.sample import device

    with bar("embeddings", "shards") as progress:
        task = progress.add_task("", total=1, rate=0, note="")

        def report(done: int, total: int) -> None:
            rate = done / max(progress.tasks[0].elapsed or 0, 1e-3)
            progress.update(task, completed=done, total=total, rate=rate)

        precompute(data, FrozenCLIP(clip, checkpoint).to(device()), out, report)
