"""The page of a sweep: what it found, figures, tables, pictures side by side, curves of training.

Half a sweep makes a page as well: what is not there is called "not run". A page stays small enough
for a phone: grids are reduced to few colours, and what does not fit is counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cascade.eval.ablation import Sweep, Value, combinations, shown, spread, value
from cascade.eval.answers import answers, no_signal
from cascade.eval.figures import curves_of_training, drawings
from cascade.eval.findings import (
    NOT_RUN,
    agreements,
    best_where,
    found,
    not_run,
    outcomes,
    scale,
    short,
)
from cascade.eval.plots import compose
from cascade.eval.report import Report
from cascade.eval.report import Value as Cell

_ROWS, _ACROSS = 8, 12  # grids of one page at most: choices down, points across
_WIDTH, _COLOURS = 720, 128  # of a grid among others; the truth's is shown as it is
_TRUTH = "truth.png"
_NEAREST, _SIZE = 6, 10_000_000  # sheets; characters behind which no more grids are added
_COSTS = {
    "cost.parameters": "parameters",
    "cost.text_parameters": "of the text encoder",
    "cost.flops": "FLOPs per call",
    "cost.gpu_hours": "GPU-hours",
    "cost.core_hours": "core-hours",
    "cost.hours": "hours",
}


def write_page(sweep: Sweep, path: Path) -> None:
    """The whole page of one sweep, in one file."""
    page = Report(sweep.name)
    for key in ("question", "paper"):
        if words := sweep.about.get(key):
            page.paragraph(f"The papers: {words}" if key == "paper" else words)
    page.heading("What it found")
    for line in found(sweep):
        page.paragraph(line)
    if agreed := agreements(sweep):
        page.paragraph(f"Agreement with the papers: {'; '.join(agreed)}.")
    page.paragraph(scale(sweep))
    if missing := not_run(sweep):
        page.paragraph(f"Not run: {missing}.")
    if sweep.stale:
        page.paragraph(f"Left out: {sweep.stale} cells of settings that are no longer asked for.")
    if sweep.rows:
        _outcomes(page, sweep)
    _pictures(page, sweep)
    if (curves := curves_of_training(sweep)) is not None:
        page.heading("Training")
        page.panels([compose([panel]) for panel in curves.panels], curves.caption)
    page.save(path)


def _outcomes(page: Report, sweep: Sweep) -> None:
    drawn = drawings(sweep)
    if drawn:
        page.heading("Figures")
    for drawing in drawn:
        page.panels([compose([panel]) for panel in drawing.panels], drawing.caption)
    page.heading("Outcomes")
    page.paragraph("Means and standard deviations over seeds.")
    page.table(*outcomes(sweep))
    tables = [
        (answer.measure.name, *table)
        for answer in ([] if no_signal(sweep) else answers(sweep))
        for table in (answer.table(), best_where(sweep, answer.measure))
        if table[1]
    ]
    if tables:
        page.heading("Tests")
    for name, columns, rows in tables:
        page.paragraph(name)
        page.table(columns, rows)
    page.heading("Every setting")
    page.paragraph("Means and standard deviations over seeds; the best of each column stands out.")
    page.table(*_settings(sweep))


def _settings(sweep: Sweep) -> tuple[list[str], list[list[Cell]], set[tuple[int, int]]]:
    """Columns, rows and the places of the best: each setting, with what it costs."""
    measures, factors = sweep.measures, list(sweep.factors)
    others = {"one.whole": "one object: right", "two.whole": "two objects: right"}
    others |= {"evaluations": "evaluations per picture", "seconds": "seconds"} | _COSTS
    others = {key: name for key, name in others.items() if any(key in r for r in sweep.rows)}
    keys = [*(measure.key for measure in measures), *others]
    columns = [*factors, "n", *(measure.name for measure in measures), *others.values()]
    rows: list[list[Cell]] = []
    for values in combinations(sweep.factors):
        cells = sweep.where(values)
        rows.append([*map(shown, values.values()), len(cells) or NOT_RUN])
        for key in keys:
            numbers = [cell[key] for cell in cells if cell.get(key) is not None]
            rows[-1].append(_number(key, numbers) if numbers else None)
    best = set()
    for column, measure in enumerate(measures, start=len(factors) + 1):
        ran = [i for i, row in enumerate(rows) if row[column] is not None]
        best.add((ran[measure.best([rows[i][column][0] for i in ran])], column))
    return columns, rows, best


def _number(key: str, numbers: Sequence[float | int]) -> Cell:
    if key not in ("cost.parameters", "cost.text_parameters", "cost.flops"):
        return spread(numbers)[:2]
    large = max(numbers)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if large >= unit:
            return f"{large / unit:.3g} {name}"
    return f"{large:.3g}"


def _pictures(page: Report, sweep: Sweep) -> None:
    """Grids of the first seed, a row for each choice, and the pictures nearest to samples."""
    if sweep.folder is None:
        return
    folders = {
        ", ".join(map(shown, of.values())) or name: sweep.folder / name
        for name, of, seed in sweep.points()
        if seed == sweep.seeds[0]
    }
    truth = [p for folder in folders.values() if (p := folder / "grids" / _TRUTH).is_file()]
    grids: dict[frozenset, list[tuple[str, Path]]] = {}
    for name, folder in folders.items():
        for path in sorted((folder / "grids").glob("*.png")):
            if path.name != _TRUTH:
                grids.setdefault(_choices(path), []).append((name, path))
    nearest = [(n, p) for n, f in folders.items() if (p := f / "nearest.png").is_file()]
    if not (truth or grids or nearest):
        return
    page.heading("Pictures")
    if truth:
        page.picture(_opened(truth[0]), "The true pictures of the captions that all grids show.")
    _grids(page, sweep, grids)
    if nearest:
        row = [(_small(path), name) for name, path in _some(nearest, _NEAREST)]
        page.row(row, "Samples, and the training pictures nearest to them.")


def _grids(page: Report, sweep: Sweep, grids: Mapping[frozenset, list[tuple[str, Path]]]) -> None:
    asked = [values for values in combinations(sweep.choices) if frozenset(values.items()) in grids]
    down, left = _some(asked, _ROWS), 0
    for values in asked:
        row = grids[frozenset(values.items())]
        across = _some(row, _ACROSS) if values in down and page.size < _SIZE else []
        left += len(row) - len(across)
        if across:
            name = ", ".join(f"{axis} {shown(v)}" for axis, v in values.items()) or "Painted"
            words = f"{name}; seed {sweep.seeds[0]}, none chosen."
            page.row([(_small(path), point) for point, path in across], words)
    if left:
        page.paragraph(f"{left} more grids lie in the sweep's folder.")


def _choices(path: Path) -> frozenset[tuple[str, Value]]:
    """What a grid's file name says: "scale=2,threshold=dynamic.png"."""
    parts = [part.partition("=") for part in path.stem.split(",") if "=" in part]
    return frozenset((axis, value(v)) for axis, _, v in parts)


def _some(items: Sequence, most: int) -> list:
    """At most so many, the first and the last among them, evenly spread."""
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
    """A line for each sweep, whose page lies in a folder beside this one."""
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
