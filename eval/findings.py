"""The page of findings: of each sweep what the papers found, what it found, and whether they agree.

Everything is made of the pair NAME.json (what was asked) and NAME.csv (what was measured) that lie
beside the page, so that anyone can make it again. Words above the first section are kept.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cascade.errors import UserError
from cascade.eval.ablation import (
    ACCURACY,
    INTERVALS,
    SEED,
    Measure,
    Sweep,
    combinations,
    read,
    shown,
    spread,
)
from cascade.eval.answers import (
    SIGNAL,
    Factorial,
    answers,
    by_held,
    cheapest,
    factorial,
    held,
    no_signal,
    settled,
)
from cascade.eval.comparison import label, where
from cascade.eval.figures import named, save_drawings
from cascade.eval.report import Value, text
from cascade.eval.tables import write_copy, write_summary
from cascade.files import write_atomically

_INTRO = """# Findings

Made by `cascade report DIR --findings FILE` of the tables beside it; `cascade report` of the folder
of these tables makes it again. A difference is called sure where its 95 % interval leaves out zero.
"""
NOT_RUN = "not\N{NO-BREAK SPACE}run"  # in a table
_NAMED = 8  # of what did not run
_FEW = 10_000  # pictures under which Fréchet distances are biased, says the protocol


def write_findings(page: Path, sweeps: Sequence[Sweep]) -> None:
    """Puts tables and figures of some sweeps beside a page, and writes it of all that lie there.

    Raises:
        UserError: two sweeps have one name.
    """
    folder, names = page.with_suffix(""), [sweep.name for sweep in sweeps]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two sweeps are called {min(twice)}: report them apart")
    for sweep in sweeps:
        write_copy(sweep, folder)
        copy = read(folder / f"{sweep.name}.json")
        write_summary(copy, folder / f"{sweep.name}_summary.csv")
        save_drawings(copy, folder)
    copies = [read(path) for path in folder.glob("*.json")]
    copies.sort(key=lambda sweep: (not factorial(sweep), len(sweep.axes), sweep.name))
    intro = page.read_text(encoding="utf-8").split("\n## ")[0] if page.exists() else _INTRO
    parts = [intro.rstrip() + "\n", overview(copies), *(section(s, folder) for s in copies)]
    write_atomically(page, lambda path: path.write_text("\n".join(parts), encoding="utf-8"))


def overview(sweeps: Sequence[Sweep]) -> str:
    """All sweeps in a table, in Markdown: what was asked, what was found, and do the papers agree.

    Of the outcomes it shows those that the papers speak of, or else the first.
    """
    rows: list[list[Value]] = []
    for sweep in sweeps:
        asked, found_ = sweep.about.get("expected") or {}, answers(sweep)
        of = [answer for answer in found_ if answer.measure.key in asked] or found_[:1]
        said = found(sweep) if no_signal(sweep) or not sweep.rows else [one.short() for one in of]
        agree = "; ".join(agreements(sweep)) or None
        link, question = f"[{sweep.name}](#{sweep.name})", sweep.about.get("question")
        rows.append([link, question, " ".join(said), agree])
    columns = ["", "question", "here", "agreement with the papers"]
    return "\n".join(["## All questions", "", *_markdown(columns, rows), ""])


def section(sweep: Sweep, folder: Path) -> str:
    """A sweep's section, in Markdown; `folder` holds its figures and tables, beside the page."""
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
    for name, drawing in named(sweep):
        lines += [f"![{name}]({folder.name}/{name}.svg)", "", drawing.caption, ""]
    if sweep.rows:
        tables = (f"{sweep.name}.csv", f"{sweep.name}_summary.csv")
        lines += [", ".join(f"[{name}]({folder.name}/{name})" for name in tables), ""]
    return "\n".join(lines)


def found(sweep: Sweep) -> list[str]:
    """What the sweep found, a sentence or two for each outcome."""
    if not sweep.rows:
        return ["not run."]
    if no_signal(sweep):
        best = max(row[ACCURACY.key] for row in sweep.rows if row.get(ACCURACY.key) is not None)
        return [f"no signal: the best cell's scene accuracy is {text(best)}, under {SIGNAL:g}."]
    lines = []
    for answer in answers(sweep):
        lines.append(answer.sentence())
        if isinstance(answer, Factorial) and answer.control:
            lines.append(answer.control.beside(sweep.control))
        if extra := cheapest(sweep, answer.measure):
            lines.append(extra)
    return lines


def short(sweep: Sweep) -> str:
    """What the sweep found in its first outcome, in one sentence."""
    if not sweep.rows or no_signal(sweep):
        return found(sweep)[0]
    return answers(sweep)[0].short()


def agreements(sweep: Sweep) -> list[str]:
    """How each outcome agrees with what the sweep says that the papers found, where it says it."""
    expected = sweep.about.get("expected") or {}
    if not sweep.rows or no_signal(sweep):
        return []
    return [
        f"{answer.measure.name}: {answer.verdict(sweep.expected(answer.measure))}"
        for answer in answers(sweep)
        if answer.measure.key in expected
    ]


def scale(sweep: Sweep) -> str:
    """How large all of this was."""
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
        f"a cell's 95 % interval over captions is about {half:.2g} to either side in {m.name}"
        for m in sweep.measures
        if (half := _half(sweep, m)) is not None
    ]
    words = "; ".join(parts if sweep.rows else parts[1:]) + "."
    if any(row["count"] < _FEW for row in sweep.rows):
        words += f" Fewer than {_FEW:,} pictures: the distances compare only with each other."
    return words


def outcomes(sweep: Sweep) -> tuple[list[str], list[list[Value]]]:
    """Columns and rows: every setting of what is not held, each outcome where it is held."""
    at = {measure: held(sweep, measure) for measure in sweep.measures}
    names = [name for name in sweep.factors if not any(name in values for values in at.values())]
    columns = [*names, *(f"{m.name}{where(at[m])}" for m in at), "n"]
    rows: list[list[Value]] = []
    for values in combinations({name: sweep.factors[name] for name in names}):
        cells = [
            _outcome(sweep, measure, {**values, **settled(sweep, measure, values, at[measure])})
            for measure in at
        ]
        n = max((cell[1] for cell in cells), default=0)
        rows.append([*map(shown, values.values()), *(cell[0] for cell in cells), n or NOT_RUN])
    return columns, rows


def best_where(sweep: Sweep, measure: Measure) -> tuple[list[str], list[list[Value]]]:
    """Columns and rows: which value is best at each place of what is held, and is that sure."""
    places = by_held(sweep, measure)
    columns = [*(places[0].at if places else ()), f"best {measure.name}", "", "surely better than"]
    rows: list[list[Value]] = []
    for one in places:
        sure = [label(one.values[pair.other]) for pair in one.pairs if pair.sure]
        spreads, values = one.spreads[one.best], one.values[one.best]
        at = map(shown, one.at.values())
        rows.append([*at, label(values), spreads[:2], ", ".join(sure) or "none"])
    return columns, rows


def not_run(sweep: Sweep) -> str:
    """The trained points and seeds of which cells are missing; "": all is there."""
    cells, missing = len(combinations(sweep.choices)), []
    for name, values, seed in sweep.points():
        if (done := len(sweep.where({**values, SEED: seed}))) < cells:
            missing.append(f"{name} ({done} of {cells} cells are there)" if done else name)
    more = [f"and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
    return ", ".join(missing[:_NAMED] + more)


def _outcome(sweep: Sweep, measure: Measure, values: dict) -> tuple[Value, int]:
    numbers = [r[measure.key] for r in sweep.where(values) if r.get(measure.key) is not None]
    return (spread(numbers)[:2], len(numbers)) if numbers else (None, 0)


def _half(sweep: Sweep, measure: Measure) -> float | None:
    """Half the width of the median of the intervals that cells were measured with."""
    low, high = (f"{INTERVALS}{measure.key}.{end}" for end in ("low", "high"))
    widths = [row[high] - row[low] for row in sweep.rows if low in row]
    return float(np.median(widths)) / 2 if widths else None


def _has(sweep: Sweep, key: str) -> bool:
    return any(row.get(key) for row in sweep.rows)


def _range(sweep: Sweep, key: str) -> str:
    numbers = [row[key] for row in sweep.rows if row.get(key)]
    ends = dict.fromkeys(f"{n:,.0f}" for n in (min(numbers, default=0), max(numbers, default=0)))
    return " to ".join(ends)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> list[str]:
    lines = [list(columns), ["---"] * len(columns), *([text(v) for v in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
