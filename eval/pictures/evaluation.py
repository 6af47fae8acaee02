"""Measuring a set of pictures on disk, by any system: features, numbers and a report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cascade.encoders.weights import weights_hash
from cascade.errors import UserError
from cascade.eval.metrics.features import CLIPFeatures, Features
from cascade.eval.metrics.measures import Sample
from cascade.eval.metrics.statistics import Moments, Origin
from cascade.eval.pages.report import Report
from cascade.eval.pictures import captions as captions_of
from cascade.eval.pictures import coco, extraction, generation, record, scoring
from cascade.eval.pictures.captions import CaptionRow
from cascade.eval.pictures.record import Record
from cascade.eval.pictures.scoring import Captions, Reference
from cascade.eval.pictures.sets import PictureSet, picture_set
from cascade.files.atomic import beside, check_apart
from cascade.files.locks import Claims
from cascade.formats.kinds import NPZ, kind_of
from cascade.grids import grid
from cascade.runs.progress import shown

SHOWN = 24  # pictures of a report


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and what it is compared to.

    Attributes:
        made: how `cascade generate` made the pictures, as fields of a record; empty for others.
        reference: a set, or a file of statistics.
        captions: a row for each picture.
        warnings: of every number.
        cache: folder of the features (default: `NAME.features` next to each set).
        draws: bootstrap resamples; 0: no bootstrapped intervals.
        device: where features are computed.
    """

    pictures: PictureSet
    made: Mapping[str, Any]
    reference: PictureSet | Path | None = None
    captions: list[CaptionRow] | None = None
    warnings: tuple[str, ...] = ()
    cache: Path | None = None
    draws: int = 200
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def notes(self) -> list[str]:
        """The conversions that pictures needed."""
        return [f"{s.path}: {n:,} {note}" for s in self.sets for note, n in s.notes.items()]

    @property
    def sets(self) -> list[PictureSet]:
        """The pictures, and the reference if it is a set too."""
        return [s for s in (self.pictures, self.reference) if isinstance(s, PictureSet)]

    def folder(self, pictures: PictureSet) -> Path:
        """Where the features of a set are kept."""
        return self.cache or beside(pictures.path, ".features")

    def check_apart(self, out: Path) -> None:
        """Raises UserError if `out` or the cache lies inside of a measured set."""
        for pictures in self.sets:
            check_apart(out, pictures.path, "choose another --out")
            check_apart(self.folder(pictures), pictures.path, "choose another --cache")

    def records(
        self, spaces: Sequence[Features], shard: tuple[int, int] = (0, 1)
    ) -> list[Record] | None:
        """All numbers; None while other shards have features to compute.

        Raises:
            UserError: a set is too small, statistics fit none of the spaces, or there is nothing to
                measure in one of them.
        """
        for pictures in self.sets:
            scoring.enough(pictures)
        fitting = self._statistics(spaces) if isinstance(self.reference, Path) else {}
        for i, space in enumerate(spaces):
            compared = isinstance(self.reference, PictureSet) or i in fitting
            if not (compared or scoring.without_reference(space, bool(self.captions))):
                raise UserError(
                    f"there is nothing to measure in {space.name}: give a --reference that has "
                    "them (and captions to a CLIP), or leave them out"
                )
        ready = [[self._rows(s, space, shard) for s in self.sets] for space in spaces]
        if any(rows is None for pair in ready for rows in pair):
            return None
        out: list[Record] = []
        for i, (space, pair) in enumerate(zip(spaces, ready)):
            to = self._reference(space, pair[1]) if len(pair) > 1 else fitting.get(i)
            out += self._measured(space, pair[0].to(self.device), to)
        return out

    def save(self, records: Sequence[Record], out: Path) -> None:
        """Writes numbers.json and report.html; one process at a time, since several may have all
        features that they need."""
        with Claims(out) as claims, claims.held("numbers", wait=True):
            record.save(records, self.notes, out / "numbers.json")
            self.report(records).save(out / "report.html")

    def report(self, records: Sequence[Record]) -> Report:
        """A page with all numbers and their protocols, and some of the pictures."""
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

    def _measured(
        self, space: Features, rows: Float[Tensor, "n d"], to: Reference | None
    ) -> Iterator[Record]:
        known = {**scoring.protocol(self.pictures), **self.made, "warnings": self.warnings}
        read = None
        if isinstance(space, CLIPFeatures) and self.captions:
            read = Captions.of(space, rows, self.pictures, self.captions)
        sample = Sample(
            space=space,
            rows=rows,
            real=to and to.rows,
            reference=to and to.moments,
            moments=to and self._moments(self.pictures, space, rows),
            cosines=read and read.cosines,
            draws=self.draws,
        )
        return scoring.records(known, sample, to, read)

    def _rows(
        self, pictures: PictureSet, space: Features, shard: tuple[int, int]
    ) -> Float[Tensor, "n d"] | None:
        folder = self.folder(pictures)
        try:
            with shown("features", "pictures") as progress:
                return extraction.features_of(pictures, space, folder, self.device, shard, progress)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot keep features in {folder}: {why}; give a --cache") from error

    def _moments(
        self, pictures: PictureSet, space: Features, rows: Float[Tensor, "n d"]
    ) -> Moments:
        return extraction.moments_of(rows, Origin.of(space, pictures.hash), self.folder(pictures))

    def _reference(self, space: Features, rows: Float[Tensor, "m d"]) -> Reference:
        other = self.reference
        moments = self._moments(other, space, rows)
        warnings = scoring.mismatches(self.pictures, other)
        rows = rows.to(self.device)
        return Reference(str(other.path), other.hash, len(other), moments, rows, warnings)

    def _statistics(self, spaces: Sequence[Features]) -> dict[int, Reference]:
        """The file of statistics as a reference in each space that it fits, by index."""
        file, moments = self.reference, Moments.load(self.reference)
        found, wrong = {}, []
        for i, space in enumerate(spaces):
            try:
                warnings = moments.check(space)
            except UserError as error:
                wrong.append(error)
            else:
                hash = weights_hash([file])
                found[i] = Reference(str(file), hash, moments.n, moments, None, warnings)
        if not found:
            raise wrong[0]
        return found

    def _show(self, page: Report) -> None:
        """Some pictures of the most frequent size, evenly spread over the ids."""
        block = max(self.pictures.blocks(len(self.pictures)), key=len)
        chosen = block[:: max(1, len(block) // SHOWN)][:SHOWN]
        pictures = next(self.pictures.batches([chosen])).permute(0, 2, 3, 1).numpy()
        step = max(1, pictures.shape[2] // 128)
        texts = self.captions and [self.captions[i]["caption"] for i in chosen]
        small = pictures[:, ::step, ::step]
        sheet = grid(small, columns=6, captions=texts, scale=max(1, 128 // small.shape[2]))
        page.picture(sheet, f"{len(chosen)} of them, evenly spaced")


def opened(path: Path, mixed: bool) -> tuple[PictureSet, Mapping[str, Any]]:
    """A set, and how `cascade generate` made it (empty for others); then it has to be complete.

    Args:
        mixed: allow pictures of several sizes.

    Raises:
        UserError: the set cannot be read, is incomplete or has several sizes.
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


def opened_reference(
    given: str, pictures: PictureSet, mixed: bool
) -> tuple[PictureSet | Path, list[str]]:
    """The reference that --reference names, and warnings: a set, statistics, or coco:DIR.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(given.removeprefix(coco.PREFIX))
    if given.startswith(coco.PREFIX):
        with shown("read", "pictures") as progress:
            return coco.reference(path, progress), coco.departures(pictures)
    if path.suffix.lower() == ".npz" or (path.is_file() and kind_of(path) == NPZ):
        return path, []
    return opened(path, mixed)[0], []


def evaluation(
    path: Path,
    reference: str | None = None,
    captions: Path | None = None,
    captioned: bool = False,
    alone: bool = False,
    mixed: bool = False,
    **choices: Any,
) -> Evaluation:
    """The evaluation of the pictures at a path.

    Args:
        reference: see `opened_reference`.
        captions: a file of them (default: those next to the pictures).
        captioned: whether a CLIP reads captions; without one they are ignored.
        alone: whether pictures are measured without reference and captions, too.
        mixed: allow pictures of several sizes.
        choices: further fields of `Evaluation`.

    Raises:
        UserError: a set or its captions cannot be read, or there is nothing to measure.
    """
    pictures, made = opened(path, mixed)
    rows = None
    if captioned and (captions or captions_of.there(pictures)):
        rows = captions_of.captioned(pictures, captions)
    to, warnings = opened_reference(reference, pictures, mixed) if reference else (None, [])
    if to is None and not rows and not alone:
        raise UserError("nothing to measure: give a --reference, or --captions and a --clip")
    found = (*scoring.squashed(pictures), *warnings)
    return Evaluation(pictures, made, to, rows, found, **choices)
