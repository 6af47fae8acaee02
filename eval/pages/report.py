"""Reports as single HTML files: targets, tables, curves and labelled sample grids.

Pictures are embedded as PNG and styles are inline; nothing is loaded and no script runs. The file
can be mailed, and adapts to phones and to dark mode. All text from outside is escaped.
"""

import base64
import io
import math
from collections.abc import Container, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure
from PIL import Image

from cascade.eval.pages.curves import loss_columns
from cascade.eval.pages.plots import GREY, PALETTE, plot
from cascade.files.atomic import write_atomically

# An entry of a table. A pair is a mean and its standard deviation over seeds (None: one seed).
Entry = str | int | float | tuple[float, float | None] | None

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2128; --soft: #626a75; --line: #dfe3e8;
  --stripe: #f6f8fa; --accent: #2265c7; --good: #157a3a; --bad: #c02626; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --text: #e4e7eb; --soft: #9aa3ae;
  --line: #303741; --stripe: #1b2027; --accent: #79aefc; --good: #57c97c; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; }
nav a { color: var(--accent); text-decoration: none; border: 1px solid var(--line);
  border-radius: 1rem; padding: .1rem .7rem; font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
.number { text-align: right; }
td.number { white-space: nowrap; }
.reached { color: var(--good); font-weight: 600; }
.missed { color: var(--bad); font-weight: 600; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem; }
.row { display: flex; gap: 1rem; overflow-x: auto; margin: .6rem 0 1.4rem; }
.row figure { flex: 0 0 min(26rem, 85vw); margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: .8rem; }
ul { padding-left: 1.2rem; max-width: 46rem; }
li { margin: .8rem 0; }
strong { color: var(--accent); }
a { color: var(--accent); }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 46rem; }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
</body>
</html>
"""


class Report:
    """A page that its methods fill from top to bottom, and that `save` writes."""

    def __init__(self, title: str):
        self._title = title
        self._headings: list[str] = []
        self._body: list[str] = []

    @property
    def size(self) -> int:
        """Characters so far."""
        return sum(map(len, self._body))

    def heading(self, text: str) -> None:
        """Open a section; the head of the page links to it."""
        self._headings.append(text)
        self._body.append(f'<h2 id="s{len(self._headings)}">{escape(text)}</h2>')

    def paragraph(self, text: str) -> None:
        self._body.append(f"<p>{escape(text)}</p>")

    def links(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Add a list of links: rows of (relative address, name, description)."""
        items = "".join(
            f'<li><a href="{escape(quote(to))}">{escape(name)}</a> {escape(what)}</li>'
            for to, name, what in rows
        )
        self._body.append(f"<ul>{items}</ul>")

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Entry]],
        best: Container[tuple[int, int]] = (),
    ) -> None:
        """Add a table; floats have four significant digits, None is a dash.

        Columns without text are right-aligned. `best`: (row, column) of entries to highlight.

        Raises:
            ValueError: a row's length differs from the number of columns.
        """
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"every row of this table needs {len(columns)} cells")
        kinds = [
            ' class="number"' if all(not isinstance(row[i], str) for row in rows) else ""
            for i in range(len(columns))
        ]
        head = "".join(f"<th{k}>{escape(c)}</th>" for k, c in zip(kinds, columns))
        body = [
            "".join(
                f"<td{k}>{_marked(escape(text(v)), (i, j) in best)}</td>"
                for j, (k, v) in enumerate(zip(kinds, row))
            )
            for i, row in enumerate(rows)
        ]
        self._table(head, body)

    def targets(self, rows: Sequence[tuple[str, Entry, Entry, bool]]) -> None:
        """Add a table of targets: rows of (description, target, measured, whether reached)."""
        head = (
            '<th>target</th><th class="number">asked</th><th class="number">measured</th><th></th>'
        )
        body = []
        for what, asked, measured, reached in rows:
            verdict = "reached" if reached else "missed"
            body.append(
                f"<td>{escape(what)}</td>"
                f'<td class="number">{escape(text(asked))}</td>'
                f'<td class="number">{escape(text(measured))}</td>'
                f'<td class="{verdict}">{verdict}</td>'
            )
        self._table(head, body)

    def picture(self, picture: Image.Image, caption: str) -> None:
        self._body.append(_figure(*_png(picture), caption))

    def row(self, pictures: Sequence[tuple[Image.Image, str]], caption: str) -> None:
        """Add named pictures side by side, which scroll horizontally on a narrow page."""
        shown = "".join(_figure(*_png(image), name) for image, name in pictures)
        self._body.append(f'<p>{escape(caption)}</p><div class="row">{shown}</div>')

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure at 160 dots per inch."""
        self._body.append(_figure(*_drawn(figure), caption))

    def panels(self, figures: Sequence[Figure], caption: str) -> None:
        """Add figures side by side if the page is wide enough, else below each other."""
        shown = "".join(_image(*_drawn(figure), caption) for figure in figures)
        self._body.append(
            f'<figure><div class="panels">{shown}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def curve(
        self, points: Sequence[tuple[float, float, str]], xlabel: str, ylabel: str, caption: str
    ) -> None:
        """Add a curve through points (x, y, label), such as distance against CLIP score."""
        figure, axes = plot(xlabel, ylabel)
        x, y, _ = zip(*points)
        axes.plot(x, y, "-o", color=PALETTE[0], linewidth=1.8, markersize=5)
        for *point, label in points:  # below, on the outer side of a convex curve
            axes.annotate(
                label, point, (0, -8), textcoords="offset points", ha="center", va="top", color=GREY
            )
        axes.margins(0.12)
        self.figure(figure, caption)

    def losses(self, path: str | Path, caption: str) -> None:
        """Plot every column of a run's metrics.csv with "loss" in its name over images seen.

        Raises:
            UserError: the file is missing or has no loss.
        """
        figure, axes = plot("images", "loss")
        for name, steps, values in loss_columns(Path(path)):
            axes.plot(steps, values, linewidth=1.2, label=name)
        axes.set_yscale("log")
        axes.legend(frameon=False, labelcolor=GREY)
        self.figure(figure, caption)

    def save(self, path: str | Path) -> None:
        """Write the page to `path` atomically."""
        links = "".join(
            f'<a href="#s{i}">{escape(text)}</a>' for i, text in enumerate(self._headings, start=1)
        )
        page = _PAGE.format(
            title=escape(self._title), style=_STYLE, links=links, body="\n".join(self._body)
        )
        write_atomically(Path(path), lambda partial: partial.write_text(page, encoding="utf-8"))

    def _table(self, head: str, rows: list[str]) -> None:
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        self._body.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>"
        )


def _png(image: Image.Image) -> tuple[bytes, int]:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue(), image.width


def _drawn(figure: Figure) -> tuple[bytes, int]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=figure.get_facecolor())
    return file.getvalue(), round(figure.get_figwidth() * 100)


def _image(png: bytes, width: int, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img width="{width}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _figure(png: bytes, width: int, caption: str) -> str:
    image = _image(png, width, caption)
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def text(value: Entry) -> str:
    """Format an entry: a mean has at most four digits, and those that its deviation supports."""
    if value is None:
        return "–"
    if isinstance(value, tuple):
        mean, deviation = value
        if not deviation or deviation < 1e-9 * abs(mean):
            return text(float(mean))
        digits = 1 - math.floor(math.log10(deviation))
        if mean:
            digits = min(digits, 3 - math.floor(math.log10(abs(mean))))
        digits = max(0, digits)
        return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _marked(cell: str, best: bool) -> str:
    return f"<strong>{cell}</strong>" if best else cell
