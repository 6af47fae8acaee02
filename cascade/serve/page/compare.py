"""The part of the page that compares models, runs and cells of sweeps."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from cascade.errors import UserError
from cascade.serve.asked import png
from cascade.serve.comparing import Side, cells, check_two, differences, measured, title_of
from cascade.serve.page.following import Asked, Desk
from cascade.serve.page.paint import EXAMPLE, HIDDEN, asks, stops
from cascade.serve.page.pieces import answered, data_url, note, table
from cascade.serve.page.sent import text, whole
from cascade.serve.places import Place, Places

PART = "compare"
SIDES, AXES = 4, 6
NOTHING = "(nothing)"
LETTERS = "ABCD"
MOST_BYTES = 24_000_000  # of the stored samples of a sweep that are sent at once

# Menus' values are checked here: Gradio compares them with choices that another event may change.
_RAW: dict[str, Any] = {"preprocess": False, **HIDDEN}

# A menu of an axis: the page shows another cell, which it has already.
_MOVED = "(name, ...values) => {{ window.cascade.moved({side}, values); return []; }}"

_LEFT = "(...values) => {{ window.cascade.left({side}); return values; }}"

# The server draws the pictures; all else that moves is done by the page itself.
_VIEWER = """<div class="viewer" data-mode="swipe"><div class="knobs">
<label>Left or first <select class="one">{options}</select></label>
<label>Right or second <select class="two">{options}</select></label>
<label{one_row}>Picture <select class="row">{rows}</select></label>
<label>How <select class="mode"><option value="swipe">Swipe</option>
<option value="flip">Flip</option><option value="both">Side by side</option></select></label>
<label>Swipe <input type="range" class="swipe" min="0" max="100" value="50"></label>
<label>Zoom <input type="range" class="zoom" min="1" max="8" step="0.25" value="1"></label></div>
<div class="views" tabindex="0" role="group"
 aria-label="Pictures that are compared: arrow keys move them, plus and minus zoom">
<div class="view"><div class="pane first"><img alt=""></div>
<div class="pane second"><img alt=""></div></div></div>
<p class="names"></p><div class="store" hidden>{store}</div></div>"""


def compare_tab(
    tab: gr.Tab, desk: Desk, places: Places, limits: Any, names: list[str]
) -> list[gr.Dropdown]:
    """Builds the part; returns the menus of places."""
    menus: list[gr.Dropdown] = []
    axes: list[list[gr.Dropdown]] = []
    with gr.Row(equal_height=False):
        for i, letter in enumerate(LETTERS[:SIDES]):
            with gr.Column(min_width=230):
                start = names[i] if i < min(2, len(names)) else NOTHING
                first = places.named(start) if start != NOTHING else None
                menus.append(gr.Dropdown([NOTHING, *names], value=start, label=f"{letter}"))
                updates = _axes(letter, first.axes if first else {})
                axes.append([gr.Dropdown(**one) for one in updates])
    with gr.Row():
        captions = gr.Textbox(
            label="Captions, one in each line", value=EXAMPLE, lines=2,
            max_length=limits.longest * limits.most_pictures, scale=3, min_width=280,
        )  # fmt: skip
        seed = gr.Number(label="Seed of all", value=0, precision=0, minimum=0, min_width=120)
    with gr.Row():
        go = gr.Button("Paint with each", variant="primary", min_width=120)
        stop = gr.Button("Cancel the comparison", min_width=120)
    empty = answered(PART, note("Choose two, to see what each painted."))
    viewer = gr.HTML(empty, elem_id="viewer", padding=False)
    facts = gr.HTML("", elem_id="facts", padding=False)
    every = [menu for i in range(SIDES) for menu in (menus[i], *axes[i])]

    def sides_of(values: Sequence[str | None]) -> dict[int, tuple[Place, Side]]:
        """What each menu names, by the menus' numbers."""
        found = {}
        for i in range(SIDES):
            name, *at = values[i * (1 + AXES) : (i + 1) * (1 + AXES)]
            if name and name != NOTHING:
                place = places.named(name)
                found[i] = place, Side.of(place, dict(zip(place.axes, map(str, at))))
        check_two([side for _, side in found.values()])
        return found

    def chosen(letter: str, name: str) -> list[Any]:
        try:
            of = places.named(name).axes if name != NOTHING else {}
        except UserError:
            of = {}
        return [gr.update(**one) for one in _axes(letter, of)]

    def shown(*values: str | None) -> str:
        return answered(PART, stored_view(values))

    def stored_view(values: Sequence[str | None]) -> str:
        try:
            sides = sides_of(values)
            pictures = [
                Picture(i, title, data_url(path.read_bytes()), cell, now)
                for i, (place, side) in sides.items()
                for title, path, cell, now in stored(place, side)
            ]
        except (UserError, OSError) as error:
            return note(str(error), "alert")
        if not pictures:
            return note("None of these has stored samples: paint with each.")
        return view(pictures, ["stored samples"])

    def opened(seen: bool, *values: str | None) -> list[Any]:
        return [True, *([gr.skip(), gr.skip()] if seen else [shown(*values), told(*values)])]

    def told(*values: str | None) -> str:
        try:
            return tables(sides_of(values))
        except (UserError, OSError) as error:
            return note(str(error), "alert")

    def asked(captions: object, seed: object, *values: str | None) -> Asked:
        lines = [line.strip() for line in text(captions).split("\n") if line.strip()]
        sides, at = sides_of(values), whole(seed, "seed") or 0
        limits.check_count(len(lines) * len(sides))
        paintings = [side.painting(lines, at) for _, side in sides.values()]

        def result(done: Any) -> str:
            pictures = [
                Picture(i, sides[i][1].title, data_url(png(picture)), row=row)
                for i, one in zip(sides, done)
                for row, picture in enumerate(one.last)
            ]
            return view(pictures, lines)

        return Asked(lambda engine, job: engine.compare(paintings, job), result)

    seen = gr.State(False)
    tab.select(opened, [seen, *every], [seen, viewer, facts], **_RAW)
    for i, menu in enumerate(menus):
        letter = gr.State(LETTERS[i])
        late: dict[str, Any] = {"trigger_mode": "always_last", **_RAW}
        menu.change(chosen, [letter, menu], axes[i], js=_LEFT.format(side=i), **HIDDEN).then(
            shown, every, viewer, **late
        ).then(told, every, facts, **late)
        for axis in axes[i]:
            axis.input(None, [menu, *axes[i]], None, js=_MOVED.format(side=i), **HIDDEN)
            axis.input(told, every, facts, **late)
    inputs = [captions, seed, *every]
    desk.parts[PART] = len(inputs), asked
    go.click(inputs=inputs, **asks(PART))
    stop.click(**stops(PART))
    return menus


def _axes(letter: str, axes: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What the menus of a sweep's axes show; those that it lacks are hidden."""
    found: list[dict[str, Any]] = [
        {"choices": of, "value": of[0], "label": f"{letter}: {axis}", "visible": True}
        for axis, of in list(axes.items())[:AXES]
    ]
    hidden = {"choices": [], "value": None, "label": f"{letter}: axis", "visible": False}
    return [*found, *[hidden] * (AXES - len(found))]


class Picture(NamedTuple):
    """One that can be shown.

    Attributes:
        side: the number of its menu.
        title: of the side, or of another cell of its sweep.
        url: of the picture.
        cell: the values of all axes.
        now: whether the side's menus name this cell.
        row: of what the same caption gave.
    """

    side: int
    title: str
    url: str
    cell: Sequence[str] = ()
    now: bool = True
    row: int = 0


def stored(place: Place, side: Side) -> Iterator[tuple[str, Path, Sequence[str], bool]]:
    """Title, file and values of a side's stored samples, and whether it is the side itself.

    Of a sweep these are all cells, so that its menus answer at once, unless they are too large.
    """
    if place.kind != "sweep":
        if path := side.stored:
            yield side.title, path, (), True
        return
    every = list(cells(place))
    few = sum(path.stat().st_size for _, path in every) <= MOST_BYTES
    for values, path in every:
        if few or values == side.values:
            yield title_of(place, values), path, list(values.values()), values == side.values


def view(pictures: Sequence[Picture], rows: Sequence[str]) -> str:
    """Pictures to swipe, flip and zoom.

    Args:
        rows: what each picture shows.
    """
    first = {one.side: one.title for one in pictures if one.now}
    options = "".join(
        f'<option value="{i}">{LETTERS[i]}: {escape(title)}</option>' for i, title in first.items()
    )
    store = "".join(
        f'<img data-side="{one.side}" data-row="{one.row}" data-title="{escape(one.title)}" '
        f'data-cell="{escape("|".join(one.cell))}"{" data-now" if one.now else ""} '
        f'loading="lazy" src="{one.url}" alt="{escape(f"{rows[one.row]}, {one.title}")}">'
        for one in pictures
        if one.side in first
    )
    named = "".join(f'<option value="{j}">{escape(row)}</option>' for j, row in enumerate(rows))
    hidden = " hidden" if len(rows) < 2 else ""
    return _VIEWER.format(options=options, rows=named, store=store, one_row=hidden)


def tables(sides: dict[int, tuple[Place, Side]]) -> str:
    """In which settings the sides differ, and their numbers."""
    columns = ["Key", *(f"{LETTERS[i]}: {side.title}" for i, (_, side) in sides.items())]
    every = [side for _, side in sides.values()]
    numbers, different = measured(every), differences(every)
    if different:
        parts = [table(columns, different, "Settings that differ")]
    else:
        parts = [note("Their settings do not differ.")]
    if numbers:
        parts.append(table(columns, numbers, "Measures, with 95 % intervals"))
    else:
        parts.append(note("No measures with intervals are stored for these."))
    return "".join(parts)
