"""The part of the page that watches trainings."""

import math
from html import escape
from typing import Any

import gradio as gr

from cascade.serve.page.paint import HIDDEN
from cascade.serve.page.pieces import image, note, table
from cascade.serve.watching import COLUMNS, Trainings, losses, newest

EVERY = 5.0  # seconds
_WIDTH, _HEIGHT = 640, 220


def watch_tab(tab: gr.Tab, trainings: Trainings) -> None:
    """Builds the part, which looks again every few seconds once it was opened."""
    run = gr.Dropdown([], label="Run to look at")
    board = gr.HTML("", elem_id="run", padding=False)
    states = gr.HTML("", elem_id="runs", padding=False)
    timer = gr.Timer(EVERY, active=False)

    def looked(name: str | None) -> list[Any]:
        found = trainings.found()
        if name not in found:
            name = next(iter(found), None)
        rows = [one.row() for one in found.values()]
        listed = table(COLUMNS, rows, "Runs") if rows else note("There are no runs yet.")
        return [gr.update(choices=list(found), value=name), one_run(trainings, name), listed]

    outputs = [run, board, states]
    tab.select(lambda: gr.Timer(active=True), None, timer, **HIDDEN)
    tab.select(looked, run, outputs, **HIDDEN)
    timer.tick(looked, run, outputs, **HIDDEN)
    run.input(lambda name: one_run(trainings, name), run, board, **HIDDEN)


def one_run(trainings: Trainings, name: str | None) -> str:
    """How far a run is, its loss, and its newest grids."""
    one = trainings.found().get(name or "")
    if one is None:
        return note("This run is not there any more: choose another.", "alert") if name else ""
    told = [f"{label.lower()} {text}" for label, text in zip(COLUMNS[2:6], one.row()[2:6]) if text]
    parts = [note(f"{one.name} is {one.state.word}" + (f": {', '.join(told)}." if told else "."))]
    parts.append(curve(losses(one.path)))
    pictures = newest(one.path)
    parts += [
        f"<figure>{image(data, f'samples {when}')}<figcaption>{escape(when)}</figcaption></figure>"
        for when, data in pictures
    ]
    if not pictures:
        parts.append(note("It has no sample grids yet."))
    return f'<div class="run">{"".join(parts)}</div>'


def curve(points: list[tuple[float, float]]) -> str:
    """The loss over images, drawn logarithmically if it is positive throughout."""
    if len(points) < 2:
        return note("It has no losses yet.")
    logs = all(loss > 0 for _, loss in points)
    scaled = [(x, math.log(loss) if logs else loss) for x, loss in points]
    (x0, x1), (y0, y1) = (_ends([p[i] for p in scaled]) for i in (0, 1))
    drawn = " ".join(
        f"{(x - x0) / (x1 - x0) * _WIDTH:.1f},{(y1 - y) / (y1 - y0) * _HEIGHT:.1f}"
        for x, y in scaled
    )
    low, high = (min(y for _, y in points), max(y for _, y in points))
    words = f"Loss from {points[0][1]:.4g} to {points[-1][1]:.4g} over {points[-1][0]:,.0f} images"
    scale = ", logarithmic" if logs else ""
    return (
        f'<figure class="curve"><svg viewBox="-4 -4 {_WIDTH + 8} {_HEIGHT + 8}" role="img" '
        f'aria-label="{words}"><polyline points="{drawn}" fill="none" stroke="#1d4ed8" '
        f'stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
        f"<figcaption>{words} (between {low:.4g} and {high:.4g}{scale}).</figcaption></figure>"
    )


def _ends(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)
