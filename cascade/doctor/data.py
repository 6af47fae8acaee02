"""Check shards: whether the index matches them, what they hold, and odd samples.

Of many tars, an evenly spaced selection is read, and the findings say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cascade.data.embeddings import EMBEDDINGS, MANIFEST, Embeddings
from cascade.data.tars import index as indexes
from cascade.data.tars.corpus import MEND
from cascade.data.tars.dataset import Dataset, read_dataset, tars_in, total
from cascade.data.tars.index import CUT, Index, Summary, counted, remedy, scan
from cascade.data.tars.keys import CAPTIONS, DOTTED, PICTURES, REMEDY
from cascade.data.tars.splits import HELD_OUT, TRAIN, chosen, lacking, split_of
from cascade.doctor.finding import Budget, Finding, note, problem, some, spread, told, warning
from cascade.doctor.looks import looks
from cascade.errors import UserError
from cascade.files.stores.places import Place, exists, is_folder

TARS = 8  # read without --full


def data(path: Place, full: bool, budget: Budget) -> Iterator[Finding]:
    """Check a folder of shards, or one tar.

    Args:
        full: read all tars.
        budget: for reading headers without an index, and for comparing copied tars.
    """
    whole = is_folder(path)
    folder = path if whole else path.parent
    tars = tars_in(path, None)
    if not tars:
        yield problem(f"{path} has no tars", "give the folder of the shards")
        return
    dataset = None
    try:
        dataset = read_dataset(folder)
    except UserError as error:
        yield told(error)
    else:
        yield from index(tars, dataset, whole, budget)
    if whole:
        yield from splits(tars, dataset)
    asked = [*tars] if full else spread(tars, TARS)
    read, bad = _read(asked, dataset, full, budget)
    yield from bad
    if len(read) + len(bad) < len(asked):
        yield note("reading takes long, and so not all was read: ask again with --full")
    if read:
        listed = dataset.tars if dataset else {}
        whole = {tar.name: listed[tar.name] for tar in tars if tar.name in listed}
        yield from samples(whole or {i.tar.name: i.summary() for i in read}, len(tars), len(read))
        yield from looks(read)
    for place in _embeddings_of(folder):
        yield from embeddings(place, [tar.stem for tar in tars])


def _embeddings_of(folder: Place) -> list[Place]:
    if not isinstance(folder, Path):
        return [folder / EMBEDDINGS] if exists(folder / EMBEDDINGS / MANIFEST) else []
    found = {folder / EMBEDDINGS, *(path.parent for path in folder.glob(f"*/{MANIFEST}"))}
    return sorted(path for path in found if path.is_dir())


def index(
    tars: Sequence[Place], dataset: Dataset | None, whole: bool, budget: Budget
) -> Iterator[Finding]:
    """Check that the folder's index matches the tars.

    Args:
        whole: whether `tars` are all tars of the folder.
    """
    folder = tars[0].parent
    if dataset is None:
        yield warning(
            "there is no index: every start reads all headers, and a tar that changes is not "
            "noticed",
            remedy(folder),
        )
        return
    listed, there = dataset.tars, {tar.name for tar in tars}
    if whole and (gone := sorted(listed.keys() - there)):
        yield problem(
            f"{gone[0]} is gone ({some(len(gone), 'such tar')})",
            f"put it back, or {remedy(folder)}",
        )
    if new := sorted(there - listed.keys()):
        yield problem(
            f"{new[0]} is not in the index ({some(len(new), 'such tar')})", remedy(folder)
        )
    if old := [name for name in sorted(listed) if not listed[name].digest]:
        yield warning(
            f"the index of {some(len(old), 'tar')} is of an older version: a copy of these shards "
            "counts as other data, and is refused by the runs that were trained on them",
            remedy(folder),
        )
    yield from _changed([tar for tar in tars if tar.name in listed], listed, budget)


def _changed(
    tars: Sequence[Place], listed: Mapping[str, Summary], budget: Budget
) -> Iterator[Finding]:
    errors: list[UserError] = []
    compared: list[Place] = []

    def compare() -> None:
        for tar in tars:
            try:
                indexes.check_unchanged(tar, listed[tar.name])
            except UserError as error:
                errors.append(error)
            compared.append(tar)

    try:
        budget.within(compare)
    except TimeoutError:
        yield note(
            f"{len(compared)} of {some(len(tars), 'tar')} were compared with the index: those that "
            "were copied are read as a whole, at the next start or with --full"
        )
    if errors:
        first = told(errors[0])
        yield problem(f"{first.what} ({some(len(errors), 'such tar')})", first.remedy)


def splits(tars: Sequence[Place], dataset: Dataset | None) -> Iterator[Finding]:
    """List the splits, and check that something is held out."""
    folder = tars[0].parent
    shares = {tar.stem: dataset.share(tar.stem) if dataset else 0.0 for tar in tars}
    named = sorted({split_of(name) for name in shares} - {None, TRAIN, HELD_OUT})
    found, said = {}, []
    for split in (TRAIN, HELD_OUT, *named):
        names, part = chosen(shares, split)
        if not names:
            continue
        found[split], many = names, some(len(names), "tar")
        share = f"{max(shares.values()):.2%} of the pictures of " if part == HELD_OUT else ""
        said.append(f"{split} ({share}{many})")
    if said:
        yield note(f"splits: {', '.join(said)}")
    if TRAIN not in found:
        error = told(lacking(folder, list(shares), TRAIN))
        yield warning(error.what, error.remedy)
    if HELD_OUT not in found:
        yield warning(
            "nothing is held out: nothing can be measured but with --split all, and sample grids "
            "show captions of the training",
            f"run `cascade data index {folder} --val 1%`, or name some tars val-*.tar",
        )
    if over := [name for name in shares if not any(name in names for names in found.values())]:
        yield warning(
            f"{over[0]}.tar is of no split, and never read ({some(len(over), 'such tar')})",
            f"name it {TRAIN}-*.tar or {HELD_OUT}-*.tar, or choose its split with data.split",
        )


def _read(
    tars: Sequence[Place], dataset: Dataset | None, full: bool, budget: Budget
) -> tuple[list[Index], list[Finding]]:
    """The indexes of some tars, and a problem for each tar that cannot be read."""
    read, bad = [], []
    for tar in tars:
        try:
            read.append(budget.within(partial(_index_of, tar, dataset, full)))
        except TimeoutError:
            break
        except UserError as error:
            bad.append(told(error))
    return read, bad


def _index_of(tar: Place, dataset: Dataset | None, full: bool) -> Index:
    """Index a tar. Raises UserError if the result differs from the folder's index."""
    if dataset is None or tar.name not in dataset.tars:
        return scan(tar)
    noted = dataset.tars[tar.name]
    again = full and noted.digest
    found = indexes.read_through(scan(tar, dataset.keys)) if again else indexes.load(tar)
    times = {"mtime_ns": noted.mtime_ns, "version": noted.version}
    now = replace(found.summary(dataset.share(tar.stem)), **times)
    if now != noted:
        raise UserError(f"{tar.name} is not what the index says: {remedy(tar.parent)}")
    return found


def samples(summaries: Mapping[str, Summary], tars: int, read: int) -> Iterator[Finding]:
    """Count the samples, those that are left out, and those without a caption."""
    sums = total(summaries.values())
    more = "" if read == tars else f"; {read} of {some(tars, 'tar')} opened, --full reads all"
    yield note(f"{some(sums.samples, 'sample')} in {some(len(summaries), 'tar')}{more}")
    lost = {reason: n for reason, n in sums.left_out.items() if reason != CUT}
    if not sums.samples:
        yield problem(
            f"no sample can be used ({counted(sums.left_out, sums.such_as)})",
            f"a sample is a picture ({', '.join(PICTURES)}) and a caption ({', '.join(CAPTIONS)}) "
            "side by side",
        )
        return
    for name in (name for name, one in summaries.items() if one.left_out.get(CUT)):
        yield problem(f"{name} is {CUT} after {summaries[name].samples:,} samples", MEND)
    if lost:
        share = sum(lost.values()) / (sums.samples + sum(lost.values()))
        yield warning(
            f"{share:.1%} of all samples are left out ({counted(lost, sums.such_as)})",
            REMEDY if DOTTED in lost else "mend them, or train without them",
        )
    if without := sums.samples - sums.txt:
        yield warning(
            f"{without / sums.samples:.1%} of the samples have no .txt, but a .json",
            "choose its fields with data.captions, or they are left out",
        )


def embeddings(folder: Place, shards: Sequence[str]) -> Iterator[Finding]:
    """Check that every tar has precomputed embeddings."""
    try:
        rows = Embeddings(folder)
        about = rows.about
        rows.require(shards)
    except UserError as error:
        yield told(error)
        return
    of = f" of {Path(about.encoder).name} ({about.hash})" if about else ", by an old version"
    yield note(f"{folder.name}{of}: there for all tars")
