"""The page of findings: what each sweep found, what the papers found, and whether they agree.

The page is generated from the pairs NAME.json (what was asked) and NAME.csv (what was measured) in
the folder of the same name, so anyone can regenerate it. Text above the first section is kept.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cascade.errors import UserError
from cascade.eval.metrics.measures import Measure
from cascade.eval.pages.report import Entry, text
from cascade.eval.pages.spread import spread
from cascade.eval.sweeps import figures, results
from cascade.eval.sweeps.answers import answers, by_held, factorial, found, held, no_signal, settled
from cascade.eval.sweeps.comparison import label, where
from cascade.eval.sweeps.folder import SEED, find_copies
from cascade.eval.sweeps.results import INTERVALS, Sweep, combinations, read_sweep, shown
from cascade.files.atomic import write_atomically

_INTRO = """# Findings

`cascade report DIR --findings FILE` generates this page from the tables in the folder of the same
name; with that folder as DIR it regenerates the page. A difference is called significant if its
95 % interval excludes zero.
"""
NOT_RUN = "not\N{NO-BREAK SPACE}run"  # in a table
_NAMED = 8  # missing points to name
_FEW = 10_000  # with fewer pictures Fréchet distances are biased


def write_findings(page: Path, sweeps: Sequence[Sweep]) -> None:
    """Add the tables and figures of some sweeps to a page's folder, and regenerate the page.

    Raises:
        UserError: two sweeps have the same name.
    """
    folder, names = page.with_suffix(""), [sweep.name for sweep in sweeps]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two sweeps are called {min(twice)}: report them separately")
    for sweep in sweeps:
        results.write_copy(sweep, folder)
        copy = read_sweep(folder / f"{sweep.name}.json")
        results.write_summary(copy, folder / f"{sweep.name}_summary.csv")
        figures.save_drawings(copy, folder)
    copies = [read_sweep(path) for path in find_copies(folder)]
    copies.sort(key=lambda sweep: (not factorial(sweep), len(sweep.axes), sweep.name))
    intro = page.read_text(encoding="utf-8").split("\n## ")[0] if page.exists() else _INTRO
    parts = [intro.rstrip() + "\n", overview(copies), *(section(s, folder) for s in copies)]
    write_atomically(page, lambda path: path.write_text("\n".join(parts), encoding="utf-8"))


def overview(sweeps: Sequence[Sweep]) -> str:
    """Return a Markdown table of all sweeps: question, finding, agreement with the papers.

    It shows the measures for which the sweep records the papers' result, or else the first one.
    """
    rows: list[list[Entry]] = []
    for sweep in sweeps:
        asked, found_ = sweep.about.get("expected") or {}, answers(sweep)
        of = [answer for answer in found_ if answer.measure.key in asked] or found_[:1]
        here = found(sweep) if no_signal(sweep) or not sweep.rows else [one.short() for one in of]
        agree = "; ".join(agreements(sweep)) or None
        link, question = f"[{sweep.name}](#{sweep.name})", sweep.about.get("question")
        rows.append([link, question, " ".join(here), agree])
    columns = ["", "question", "here", "agreement with the papers"]
    return "\n".join(["## All questions", "", *_markdown(columns, rows), ""])


def section(sweep: Sweep, folder: Path) -> str:
    """Return a sweep's section in Markdown; `folder`, next to the page, holds its figures."""
    lines = [f"## {sweep.name}", "", f"{sweep.about.get('question', '')}", ""]
    if paper := sweep.about.get("paper"):
        lines += [f"**The papers.** {paper}", ""]
    lines += ["**Here.**", "", *(f"* {line}" for line in found(sweep)), ""]
    if lines_of_agreement := agreements(sweep):
        lines += [f"**Agreement.** {'; '.join(lines_of_agreement)}.", ""]
    lines += [f"**Scale.** {scale(sweep)}", ""]
    if sweep.rows:
        lines += [*_markdown(*outcomes(sweep)), ""]
    if sweep.measures and not no_signal(sweep):
        columns, rows = best_where(sweep, answers(sweep)[0].measure)
        lines += [*_markdown(columns, rows), ""] if rows else []
    if missing := not_run(sweep):
        lines += [f"Not run: {missing}.", ""]
    for name, drawing in figures.named(sweep):
        lines += [f"![{name}]({folder.name}/{name}.svg)", "", drawing.caption, ""]
    if sweep.rows:
        tables = (f"{sweep.name}.csv", f"{sweep.name}_summary.csv")
        lines += [", ".join(f"[{name}]({folder.name}/{name})" for name in tables), ""]
    return "\n".join(lines)


def agreements(sweep: Sweep) -> list[str]:
    """Return for each measure with a recorded result of the papers whether it agrees."""
    expected = sweep.about.get("expected") or {}
    if not sweep.rows or no_signal(sweep):
        return []
    return [
        f"{answer.measure.name}: {answer.verdict(sweep.expected(answer.measure))}"
        for answer in answers(sweep)
        if answer.measure.key in expected
    ]


def scale(sweep: Sweep) -> str:
    """Return the scale of the sweep: captions, seeds, images, parameters, devices, intervals."""
    parts = [f"{_range(sweep, 'count')} captions", f"seeds {', '.join(map(str, sweep.seeds))}"]
    named = {
        "cost.images": "images seen in training",
        "cost.parameters": "parameters of the trained stage",
        "cost.text_parameters": "parameters of the text encoder",
    }
    parts += [f"{_range(sweep, key)} {what}" for key, what in named.items() if _has(sweep, key)]
    parts += sorted({str(row["cost.device"]) for row in sweep.rows if row.get("cost.device")})
    parts += [str(sweep.about[key]) for key in ("features", "reference") if sweep.about.get(key)]
    parts += [
        f"95 % interval of a cell over captions: about ± {half:.2g} in {m.name}"
        for m in sweep.measures
        if (half := _half(sweep, m)) is not None
    ]
    words = "; ".join(parts if sweep.rows else parts[1:]) + "."
    if any(row["count"] < _FEW for row in sweep.rows):
        words += f" Fewer than {_FEW:,} pictures: distances are comparable only with each other."
    return words


def outcomes(sweep: Sweep) -> tuple[list[str], list[list[Entry]]]:
    """Return columns and rows: all settings of the factors that are not held, by every measure."""
    at = {measure: held(sweep, measure) for measure in sweep.measures}
    names = [name for name in sweep.factors if not any(name in values for values in at.values())]
    columns = [*names, *(f"{m.name}{where(at[m])}" for m in at), "n"]
    rows: list[list[Entry]] = []
    for values in combinations({name: sweep.factors[name] for name in names}):
        settings = [{**values, **settled(sweep, m, values, at[m])} for m in at]
        numbers = [sweep.numbers(m.key, setting) for m, setting in zip(at, settings)]
        means = [spread(of)[:2] if of else None for of in numbers]
        n = max(map(len, numbers), default=0)
        rows.append([*map(shown, values.values()), *means, n or NOT_RUN])
    return columns, rows


def best_where(sweep: Sweep, measure: Measure) -> tuple[list[str], list[list[Entry]]]:
    """Return columns and rows: the best value at every combination of the held choices."""
    places = by_held(sweep, measure)
    columns = [
        *(places[0].at if places else ()),
        f"best {measure.name}",
        "",
        "significantly better than",
    ]
    rows: list[list[Entry]] = []
    for one in places:
        worse = [label(one.values[pair.other]) for pair in one.pairs if pair.significant]
        spreads, values = one.spreads[one.best], one.values[one.best]
        at = map(shown, one.at.values())
        rows.append([*at, label(values), spreads[:2], ", ".join(worse) or "none"])
    return columns, rows


def not_run(sweep: Sweep) -> str:
    """Name the trained points with missing cells; "" if the sweep is complete."""
    cells, missing = len(combinations(sweep.choices)), []
    for name, values, seed in sweep.points():
        if (done := len(sweep.where({**values, SEED: seed}))) < cells:
            missing.append(f"{name} ({done} of {cells} cells)" if done else name)
    more = [f"and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
    return ", ".join(missing[:_NAMED] + more)


def _half(sweep: Sweep, measure: Measure) -> float | None:
    """Return half the median width of the cells' intervals; None if they have none."""
    low, high = (f"{INTERVALS}{measure.key}.{end}" for end in ("low", "high"))
    widths = [row[high] - row[low] for row in sweep.rows if low in row]
    return float(np.median(widths)) / 2 if widths else None


def _has(sweep: Sweep, key: str) -> bool:
    return any(row.get(key) for row in sweep.rows)


def _range(sweep: Sweep, key: str) -> str:
    numbers = [row[key] for row in sweep.rows if row.get(key)]
    ends = dict.fromkeys(f"{n:,.0f}" for n in (min(numbers, default=0), max(numbers, default=0)))
    return " to ".join(ends)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Entry]]) -> list[str]:
    lines = [list(columns), ["---"] * len(columns), *([text(v) for v in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
