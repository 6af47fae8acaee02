"""Reports as single HTML files: targets, tables, curves and labelled sample grids.

Pictures are embedded as PNG. The file can be mailed, and adapts to phones and to dark mode. All
text from outside is escaped. The page's policy lets the browser load nothing, and run one script at
most: compare.js, which is known by its hash, and without which the page shows the same pictures.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<nav aria-label="Sections">{links}</nav>
{body}
</main>
{script}</body>
</html>
"""
_POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Cell:
    """A picture that the reader can compare with those of other cells.

    Args:
        name: shown below it.
        values: the cell's place: its value on each axis.
        numbers: what was measured in this cell, in words.
    """

    picture: Image.Image
    name: str
    values: Mapping[str, str]
    numbers: str


class Report:
    """A page that its methods fill from top to bottom, and that `save` writes."""

    def __init__(self, title: str):
        self._title = title
        self._headings: list[str] = []
        self._body: list[str] = []
        self._cells = 0

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
        numbers = "".join(f'<th class="number">{name}</th>' for name in ("asked", "measured"))
        head = f"<th>target</th>{numbers}<th>verdict</th>"
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
        self._row([_figure(*_png(image), name) for image, name in pictures], caption)

    def cells(self, cells: Sequence[Cell], caption: str) -> None:
        """Add a row of pictures; the first row is preceded by the comparison of all rows' cells."""
        if not self._cells:
            self._body.append(_asset("compare.html"))
        self._cells += len(cells)
        shown = []
        for cell in cells:
            values, numbers = escape(json.dumps(dict(cell.values))), escape(cell.numbers)
            about = f' data-cell="{values}" data-numbers="{numbers}"'
            shown.append(_figure(*_png(cell.picture), cell.name, about))
        self._row(shown, caption)

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
        style, script = _asset("report.css"), _asset("compare.js") if self._cells else ""
        policy = [_POLICY, f"style-src {_hash(style)}", script and f"script-src {_hash(script)}"]
        page = _PAGE.format(
            policy="; ".join(filter(None, policy)),
            title=escape(self._title),
            style=style,
            links=links,
            body="\n".join(self._body),
            script=script and f"<script>{script}</script>\n",
        )
        write_atomically(Path(path), lambda partial: partial.write_text(page, encoding="utf-8"))

    def _row(self, figures: Sequence[str], caption: str) -> None:
        text = escape(caption)
        self._body.append(
            f'<p>{text}</p><div class="row" tabindex="0" role="group" aria-label="{text}">'
            f"{''.join(figures)}</div>"
        )

    def _table(self, head: str, rows: list[str]) -> None:
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        self._body.append(
            '<div class="scroll" tabindex="0" role="group" aria-label="table">'
            f"<table><thead><tr>{head}</tr></thead>\n"
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


def _figure(png: bytes, width: int, caption: str, attributes: str = "") -> str:
    image = _image(png, width, caption)
    return f"<figure{attributes}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


@cache
def _asset(name: str) -> str:
    """Return a text that lies next to this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression that admits an inline style or script (CSP level 2)."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"'sha256-{digest.decode('ascii')}'"


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
