"""The page: its parts, its looks, and what happens when it is loaded."""

from pathlib import Path
from typing import Any

import gradio as gr

from cascade.serve.limits import Limits
from cascade.serve.page.compare import NOTHING, compare_tab
from cascade.serve.page.edit import edit_tab
from cascade.serve.page.following import Desk
from cascade.serve.page.paint import HIDDEN, paint_tab
from cascade.serve.page.watch import watch_tab
from cascade.serve.places import Places
from cascade.serve.watching import Trainings

MOST_STAGES = 8

_HERE = Path(__file__).parent
CSS = (_HERE / "page.css").read_text(encoding="utf-8")
HEAD = f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>"
THEME = gr.themes.Default(
    primary_hue="blue",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # contrasts of 4.5 and more
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    color_accent="*primary_700",
)


def page(desk: Desk, places: Places, limits: Limits) -> gr.Blocks:
    """The page over a line of jobs."""
    with gr.Blocks(title="Cascade", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML("<h1>Cascade</h1>", padding=False)
        with gr.Tab("Paint"):
            painter = paint_tab(desk, places, limits, MOST_STAGES)
        with gr.Tab("Edit"):
            editor = edit_tab(
                desk, places, limits, [n for n, p in places.found().items() if p.edits]
            )

        with gr.Tab("Compare") as compare:
            compared = compare_tab(compare, desk, places, limits, list(places.found()))
        with gr.Tab("Watch") as watch:
            watch_tab(watch, Trainings(places.roots))

        def loaded(*chosen: str) -> list[Any]:
            desk.line.start()
            found = places.found()
            names = [name for name, place in found.items() if place.paints]
            menus = [names, [name for name in names if found[name].edits]]
            menus += [[NOTHING, *found]] * len(compared)
            # A name that is still there is not set: the visitor may have chosen another meanwhile.
            return [
                gr.update(choices=menu, **({} if name in menu else {"value": (menu or [None])[0]}))
                for menu, name in zip(menus, chosen)
            ]

        every = [painter, editor, *compared]
        blocks.load(loaded, every, every, **HIDDEN)
    return blocks
