"""`cascade evaluate --pictures`: the numbers of pictures on disk, by whatever system they are."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from cascade.data.claims import Claims
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.sources import weights_hash
from cascade.errors import UserError
from cascade.eval import captions, coco, generation, record, scoring
from cascade.eval.captions import Row
from cascade.eval.extraction import features_of, moments_of
from cascade.eval.features import (
    CLEAN,
    PYTORCH_FID,
    TENSORFLOW,
    CLIPFeatures,
    DINOv2Features,
    Features,
    InceptionFeatures,
)
from cascade.eval.record import Record
from cascade.eval.report import Report
from cascade.eval.scoring import Reference
from cascade.eval.sets import PictureSet, picture_set
from cascade.eval.share import share, whole
from cascade.eval.statistics import Moments, Origin
from cascade.files import beside, check_apart, check_writable
from cascade.grids import grid
from cascade.kinds import NPZ, kind_of
from cascade.verbs.data import shown
from cascade.verbs.sample import device

RESIZES = {"clean": CLEAN, "pytorch": PYTORCH_FID, "tensorflow": TENSORFLOW}
SHOWN = 24


def main(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes numbers.json and report.html."""
    if args.data or args.judge or args.set:
        raise UserError("--data, --judge and --set are for --model: leave them out with --pictures")
    if args.bootstrap < 0:
        raise UserError("--bootstrap: give a number of draws, or 0 for no intervals")
    out = Path(args.out) if args.out else beside(Path(args.pictures), ".evaluation")
    check_writable(out, "choose another --out")
    shard, spaces = share(args.shard), spaces_of(args)
    work = scoring_of(args)
    for pictures in work.sets:
        check_apart(out, pictures.path, "choose another --out")
        check_apart(work.folder(pictures), pictures.path, "choose another --cache")
    records = work.records(spaces, shard)
    if records is None:
        print(
            f"the features of shard {shard[0]}/{shard[1]} are there. The last shard measures; what "
            f"nobody makes, this does: {whole(args)}"
        )
        return
    for note in work.notes:
        print(note)
    Console().print(*record.tables(records), sep="\n\n")
    with Claims(out) as claims, claims.held("numbers", wait=True):  # several may have all they need
        record.save(records, work.notes, out / "numbers.json")
        work.report(records).save(out / "report.html")
    print(f"{out / 'numbers.json'}, {out / 'report.html'}")


def spaces_of(args: argparse.Namespace) -> list[Features]:
    """The feature spaces that were asked for. UserError if none was, or weights are missing."""
    found: list[Features] = []
    if args.resize not in (None, "clean") and not args.inception:
        raise UserError(f"--resize {args.resize} is Inception's: give --inception FILE, or clean")
    if args.checkpoint and not args.clip:
        raise UserError("--checkpoint is of a CLIP: give --clip NAME as well, or leave it out")
    if args.inception:
        resize = {"resize": RESIZES[args.resize]} if args.resize else {}
        found.append(InceptionFeatures(args.inception, **resize).to(device()))
    if args.dino:
        found.append(DINOv2Features(args.dino).to(device()))
    if args.clip:
        found.append(CLIPFeatures(FrozenCLIP(args.clip, args.checkpoint).to(device())))
    if not found:
        raise UserError("no features to measure in: give --inception FILE, --clip or --dino DIR")
    return found


@dataclass(frozen=True)
class Scoring:
    """What is measured, and against what.

    Attributes:
        made: how `cascade generate` made the pictures, by the names of a record; empty: others did.
        reference: a set, or a file of statistics.
        captions: a row for each picture.
        said: to be said beside each number.
        cache: where features are kept; None: beside each set, in `NAME.features`.
        draws: of the bootstrap; 0: none.
    """

    pictures: PictureSet
    made: Mapping[str, Any]
    reference: PictureSet | Path | None = None
    captions: list[Row] | None = None
    said: tuple[str, ...] = ()
    cache: Path | None = None
    draws: int = 200

    @property
    def notes(self) -> list[str]:
        """What was converted to be measured."""
        return [f"{s.path}: {n:,} {note}" for s in self.sets for note, n in s.notes.items()]

    @property
    def sets(self) -> list[PictureSet]:
        """The pictures, and the reference if it is pictures too."""
        return [s for s in (self.pictures, self.reference) if isinstance(s, PictureSet)]

    def records(
        self, spaces: Sequence[Features], shard: tuple[int, int] = (0, 1)
    ) -> list[Record] | None:
        """All numbers; None if other shards have features to compute.

        Raises:
            UserError: a set is too small, or statistics are those of none of the spaces.
        """
        for pictures in self.sets:
            scoring.enough(pictures)
        fitting = self._statistics(spaces) if isinstance(self.reference, Path) else {}
        ready = [[self._rows(s, space, shard) for s in self.sets] for space in spaces]
        if any(rows is None for pair in ready for rows in pair):
            return None
        out: list[Record] = []
        for i, (space, pair) in enumerate(zip(spaces, ready)):
            to = self._reference(space, pair[1]) if len(pair) > 1 else fitting.get(i)
            out += self._measured(space, pair[0].to(device()), to)
        return out

    def _measured(
        self, space: Features, rows: Float[Tensor, "n d"], to: Reference | None
    ) -> Iterator[Record]:
        fields = {**scoring.protocol(self.pictures), **self.made}
        make = scoring.maker(space, fields, self.said)
        if to is not None:
            moments = self._moments(self.pictures, space, rows)
            yield from scoring.against(make, space, rows, moments, to, self.draws)
        if isinstance(space, InceptionFeatures):
            yield scoring.inception_score(make, space, rows, self.draws)
        if isinstance(space, CLIPFeatures) and self.captions:
            yield from scoring.clip_scores(make, space, rows, self.pictures, self.captions)

    def _rows(
        self, pictures: PictureSet, space: Features, shard: tuple[int, int]
    ) -> Float[Tensor, "n d"] | None:
        folder = self.folder(pictures)
        try:
            with shown("features", "pictures") as progress:
                return features_of(pictures, space, folder, device(), shard, progress)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot keep features in {folder}: {why}; give a --cache") from error

    def _moments(
        self, pictures: PictureSet, space: Features, rows: Float[Tensor, "n d"]
    ) -> Moments:
        return moments_of(rows, Origin.of(space, pictures.hash), self.folder(pictures))

    def folder(self, pictures: PictureSet) -> Path:
        """Where the features of a set are kept."""
        return self.cache or beside(pictures.path, ".features")

    def _reference(self, space: Features, rows: Float[Tensor, "m d"]) -> Reference:
        other = self.reference
        said = scoring.beware(self.pictures, other)
        moments = self._moments(other, space, rows)
        rows = rows.to(device())
        return Reference(str(other.path), other.hash, len(other), moments, rows, said)

    def _statistics(self, spaces: Sequence[Features]) -> dict[int, Reference]:
        """A file of statistics, by the number of each space that they can be of."""
        file, moments = self.reference, Moments.load(self.reference)
        found, wrong = {}, []
        for i, space in enumerate(spaces):
            try:
                said = moments.check(space)
                found[i] = Reference(
                    str(file), weights_hash([file]), moments.n, moments, None, said
                )
            except UserError as error:
                wrong.append(error)
        if not found:
            raise wrong[0]
        return found

    def report(self, records: Sequence[Record]) -> Report:
        """A page with all numbers, each with its protocol, and some of the pictures."""
        page = Report(f"{self.pictures.path.resolve().name}: {len(self.pictures):,} pictures")
        for note in self.notes:
            page.paragraph(note)
        page.heading("Numbers")
        page.table(record.COLUMNS, record.rows(records))
        page.heading("Pictures")
        self._show(page)
        page.heading("Each number with its protocol")
        for found in records:
            page.paragraph(found.words)
        return page

    def _show(self, page: Report) -> None:
        """Some pictures, evenly through the ids, of the size that most of them have."""
        block = max(self.pictures.blocks(len(self.pictures)), key=len)
        chosen = block[:: max(1, len(block) // SHOWN)][:SHOWN]
        pictures = next(self.pictures.batches([chosen])).permute(0, 2, 3, 1).numpy()
        step = max(1, pictures.shape[2] // 128)
        texts = self.captions and [self.captions[i]["caption"] for i in chosen]
        small = pictures[:, ::step, ::step]
        sheet = grid(small, columns=6, captions=texts, scale=max(1, 128 // small.shape[2]))
        page.picture(sheet, f"{len(chosen)} of them, none chosen")


def scoring_of(args: argparse.Namespace) -> Scoring:
    """What the command line asks for.

    Raises:
        UserError: a set or its captions cannot be used, or there is nothing to measure.
    """
    mixed = args.resize is not None
    pictures, made = opened(Path(args.pictures), mixed)
    found = _captions(args, pictures)
    reference, said = None, []
    if args.reference and args.reference.startswith(coco.PREFIX):
        said = coco.departures(pictures)
        with shown("read", "pictures") as progress:
            reference = coco.reference(Path(args.reference.removeprefix(coco.PREFIX)), progress)
    elif args.reference and _statistics(Path(args.reference)):
        reference = Path(args.reference)
    elif args.reference:
        reference, _ = opened(Path(args.reference), mixed)
    if reference is None and not found and not args.inception:
        raise UserError("nothing to measure: give a --reference, or --captions and a --clip")
    return Scoring(
        pictures,
        made,
        reference,
        found,
        (*scoring.squashed(pictures), *said),
        Path(args.cache) if args.cache else None,
        args.bootstrap,
    )


def _statistics(file: Path) -> bool:
    """Whether a reference is a file of statistics: it is one of arrays, or is called so."""
    return file.suffix.lower() == ".npz" or (file.is_file() and kind_of(file) == NPZ)


def opened(path: Path, mixed: bool) -> tuple[PictureSet, Mapping[str, Any]]:
    """A set, and how it was made, if here; then it has to be whole.

    Args:
        mixed: pictures may be of several sizes.
    """
    if path.is_file() and (found := kind_of(path)):
        raise UserError(
            f"{path} is {found}: give pictures as a folder or a tar of PNG, JPEG or WebP files, "
            "and statistics as mu and sigma in an .npz (numpy.savez)"
        )
    made = generation.check(path) if generation.generated(path) else None
    with shown("read", "pictures") as progress:
        pictures = picture_set(path, made and made.ids, progress=progress)
    if not mixed:
        _ = pictures.size
    return pictures, made.protocol if made else {}


def _captions(args: argparse.Namespace, pictures: PictureSet) -> list[Row] | None:
    """Those of the pictures, if a CLIP is there to read them and anybody wrote any."""
    if args.captions and not args.clip:
        raise UserError("--captions are for a CLIP score: give --clip as well, or leave them out")
    if not args.clip or not (args.captions or captions.there(pictures)):
        return None
    return captions.captioned(pictures, Path(args.captions) if args.captions else None)
