"""The report of a sweep: findings, figures, tables, samples side by side, training curves.

An unfinished sweep can be reported too; missing cells are listed as "not run". A page stays small
enough for a phone: grids are reduced to few colours, and the ones that do not fit are counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cascade.eval.pages.plots import compose
from cascade.eval.pages.report import Cell, Entry, Report, text
from cascade.eval.pages.spread import spread
from cascade.eval.sweeps import figures, findings, results, rungs
from cascade.eval.sweeps.answers import answers, found, no_signal, short
from cascade.eval.sweeps.folder import Point, find_sweeps, is_sweep
from cascade.eval.sweeps.results import Sweep, Values, as_value, combinations, read_sweep, shown
from cascade.files.atomic import check_writable

_ROWS, _ACROSS = 8, 12  # most grids of a page: choices down, points across
_WIDTH, _COLOURS = 720, 128  # of a grid in a row; the true pictures are not reduced
_NEAREST, _SIZE = 6, 10_000_000  # most sheets; characters beyond which grids are left out
_COSTS = {
    "cost.parameters": "parameters",
    "cost.text_parameters": "of the text encoder",
    "cost.flops": "FLOPs per call",
    "cost.gpu_hours": "GPU-hours",
    "cost.core_hours": "core-hours",
    "cost.hours": "hours",
}


def write_report(root: Path, out: Path | None, update: Path | None) -> list[Path]:
    """Report the sweep, or all sweeps, in a folder; return the pages that were written.

    Args:
        out: folder for pages, tables and figures; None: `root`.
        update: page of findings to update, with its tables in the folder of the same name.
    """
    sweeps, pages = [read_sweep(path) for path in find_sweeps(root)], []
    if update:
        check_writable(update.parent, "choose another --findings")
        findings.write_findings(update, sweeps)
        pages.append(update)
    if out is None and all(sweep.folder is None for sweep in sweeps):
        return pages  # the tables of a page of findings, which have no page of their own
    out = out or root
    check_writable(out, "choose another --out")
    folders = [out if is_sweep(root) else out / sweep.place for sweep in sweeps]
    for sweep, folder in zip(sweeps, folders):
        results.write_cells(sweep, folder / "cells.csv")
        results.write_summary(sweep, folder / "summary.csv")
        figures.save_drawings(sweep, folder / "figures")
        write_page(sweep, folder / "report.html")
        pages.append(folder / "report.html")
    if not is_sweep(root):
        write_index(list(zip(sweeps, folders)), out / "index.html")
        pages.append(out / "index.html")
    return pages


def write_page(sweep: Sweep, path: Path) -> None:
    """Write the page of one sweep."""
    page = Report(sweep.name)
    for key in ("question", "paper"):
        if words := sweep.about.get(key):
            page.paragraph(f"The papers: {words}" if key == "paper" else words)
    page.heading("Findings")
    for line in found(sweep):
        page.paragraph(line)
    if agreed := findings.agreements(sweep):
        page.paragraph(f"Agreement with the papers: {'; '.join(agreed)}.")
    page.paragraph(findings.scale(sweep))
    if missing := findings.not_run(sweep):
        page.paragraph(f"Not run: {missing}.")
    for name, why in sweep.about.get("cut", {}).items():
        page.paragraph(rungs.said(name, rungs.Cut(*why)))
    if sweep.stale:
        page.paragraph(f"Left out: {sweep.stale} cells of settings that are no longer asked for.")
    if sweep.rows:
        _outcomes(page, sweep)
    _pictures(page, sweep)
    if (curves := figures.curves_of_training(sweep)) is not None:
        page.heading("Training")
        page.panels([compose([panel]) for panel in curves.panels], curves.caption)
    page.save(path)


def _outcomes(page: Report, sweep: Sweep) -> None:
    drawn = figures.drawings(sweep)
    if drawn:
        page.heading("Figures")
    for drawing in drawn:
        page.panels([compose([panel]) for panel in drawing.panels], drawing.caption)
    page.heading("Outcomes")
    page.paragraph("Means and standard deviations over seeds.")
    page.table(*findings.outcomes(sweep))
    tables = [
        (answer.measure.name, *table)
        for answer in ([] if no_signal(sweep) else answers(sweep))
        for table in (answer.table(), findings.best_where(sweep, answer.measure))
        if table[1]
    ]
    if tables:
        page.heading("Tests")
    for name, columns, rows in tables:
        page.paragraph(name)
        page.table(columns, rows)
    page.heading("Every setting")
    page.paragraph(
        "Means and standard deviations over seeds; the best of each column is highlighted."
    )
    page.table(*_settings(sweep))


def _settings(sweep: Sweep) -> tuple[list[str], list[list[Entry]], set[tuple[int, int]]]:
    """Return columns, rows and the positions of the best: all settings, with their costs."""
    measures, factors = sweep.measures, list(sweep.factors)
    others = {"one.whole": "one object: right", "two.whole": "two objects: right"}
    others |= {"evaluations": "evaluations per picture", "seconds": "seconds"} | _COSTS
    others = {key: name for key, name in others.items() if any(key in r for r in sweep.rows)}
    keys = [*(measure.key for measure in measures), *others]
    columns = [*factors, "n", *(measure.name for measure in measures), *others.values()]
    rows: list[list[Entry]] = []
    for values in combinations(sweep.factors):
        n = len(sweep.where(values)) or findings.NOT_RUN
        rows.append([*map(shown, values.values()), n])
        for key in keys:
            numbers = sweep.numbers(key, values)
            rows[-1].append(_number(key, numbers) if numbers else None)
    best = set()
    for column, measure in enumerate(measures, start=len(factors) + 1):
        ran = [i for i, row in enumerate(rows) if row[column] is not None]
        best.add((ran[measure.best([rows[i][column][0] for i in ran])], column))
    return columns, rows, best


def _number(key: str, numbers: Sequence[float | int]) -> Entry:
    if key not in ("cost.parameters", "cost.text_parameters", "cost.flops"):
        return spread(numbers)[:2]
    large = max(numbers)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if large >= unit:
            return f"{large / unit:.3g} {name}"
    return f"{large:.3g}"


def _pictures(page: Report, sweep: Sweep) -> None:
    """Add the grids of the first seed, a row per choice, and the nearest training pictures."""
    if sweep.folder is None:
        return
    points = [
        (of, Point(sweep.folder / name))
        for name, of, seed in sweep.points()
        if seed == sweep.seeds[0]
    ]
    truth = [point.truth for _, point in points if point.truth.is_file()]
    grids: dict[frozenset, list[tuple[Values, str, Path]]] = {}
    for of, point in points:
        for choices, path in point.grids():
            key = frozenset((axis, as_value(v)) for axis, v in choices.items())
            grids.setdefault(key, []).append((of, _named(of, point), path))
    nearest = [(_named(of, p), p.nearest) for of, p in points if p.nearest.is_file()]
    if not (truth or grids or nearest):
        return
    page.heading("Pictures")
    if truth:
        page.picture(_opened(truth[0]), "The true pictures of the captions in all grids.")
    _grids(page, sweep, grids)
    if nearest:
        row = [(_small(path), name) for name, path in _some(nearest, _NEAREST)]
        page.row(row, "Samples and their nearest training pictures.")


def _grids(
    page: Report, sweep: Sweep, grids: Mapping[frozenset, list[tuple[Values, str, Path]]]
) -> None:
    asked = [values for values in combinations(sweep.choices) if frozenset(values.items()) in grids]
    down, left = _some(asked, _ROWS), 0
    for values in asked:
        row = grids[frozenset(values.items())]
        across = _some(row, _ACROSS) if values in down and page.size < _SIZE else []
        left += len(row) - len(across)
        if across:
            name = ", ".join(f"{axis} {shown(v)}" for axis, v in values.items()) or "Samples"
            cells = [_cell(sweep, {**of, **values}, point, path) for of, point, path in across]
            page.cells(cells, f"{name}; seed {sweep.seeds[0]}, not cherry-picked.")
    if left:
        page.paragraph(f"{left} more grids are in the sweep's folder.")


def _cell(sweep: Sweep, values: Values, point: str, path: Path) -> Cell:
    found = [(measure.name, sweep.numbers(measure.key, values)) for measure in sweep.measures]
    numbers = ", ".join(f"{name} {text(spread(each)[:2])}" for name, each in found if each)
    return Cell(_small(path), point, {k: shown(v) for k, v in values.items()}, numbers)


def _named(of: Values, point: Point) -> str:
    return ", ".join(map(shown, of.values())) or point.folder.name


def _some(items: Sequence, most: int) -> list:
    """Return at most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _opened(path: Path) -> Image.Image:
    return Image.open(path, formats=["PNG"]).convert("RGB")


def _small(path: Path) -> Image.Image:
    image = _opened(path)
    image.thumbnail((_WIDTH, 2 * _WIDTH), Image.Resampling.BOX)
    return image.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def write_index(pages: Sequence[tuple[Sweep, Path]], path: Path) -> None:
    """Write a page with a line and a link for each sweep, whose page is in a subfolder."""
    page = Report("Sweeps")
    lines = [
        (
            f"{folder.name}/report.html",
            sweep.name,
            f"{sweep.about.get('question', '')} {short(sweep)}",
        )
        for sweep, folder in pages
    ]
    page.links(lines)
    page.save(path)
