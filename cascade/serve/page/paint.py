"""The part of the page that paints captions."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from cascade.errors import UserError
from cascade.serve.asked import Painting
from cascade.serve.page.following import Desk
from cascade.serve.page.pieces import note, painted
from cascade.serve.places import Knob, Place, Places

PART = "paint"
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
EXAMPLE = "a red circle above a blue square"


def models(places: Places) -> list[str]:
    """The names of what paints captions, models first."""
    return [name for name, place in places.found().items() if place.paints]


def knobs_of(place: Place | None) -> list[Knob]:
    try:
        return place.knobs if place else []
    except UserError:
        return []


def sets_of(knobs: Sequence[Knob], values: Sequence[float | None]) -> tuple[str, ...]:
    """The sampling choices that differ from the model's own.

    Args:
        values: guidance and steps of each stage, in turn.
    """
    sets = []
    for knob, scale, steps in zip(knobs, values[::2], values[1::2]):
        if scale is not None and scale != knob.scale:
            sets.append(f"{knob.stage}.scale={float(scale):g}")
        if steps is not None and steps != knob.steps:
            sets.append(f"{knob.stage}.steps={int(steps)}")
    return tuple(sets)


def fields(most: int, limit: int, knobs: Sequence[Knob]) -> list[gr.Number]:
    """Two fields for each stage, of which those are shown that the chosen model has."""
    found = []
    for i in range(most):
        with gr.Row():
            for options in _options(knobs, i, limit):
                found.append(gr.Number(**options, min_width=120))
    return found


def _options(knobs: Sequence[Knob], i: int, limit: int) -> list[dict[str, Any]]:
    """What the two fields of a stage show."""
    knob = knobs[i] if i < len(knobs) else Knob("", None, None)
    of = {"visible": i < len(knobs)}
    return [
        {"label": f"{knob.stage}: guidance", "value": knob.scale, "minimum": 0, "maximum": 100}
        | {"step": 0.1} | of,
        {"label": f"{knob.stage}: steps", "value": knob.steps, "minimum": 1, "maximum": limit}
        | {"precision": 0, "step": 1} | of,
    ]  # fmt: skip


def updates(knobs: Sequence[Knob], most: int, limit: int) -> list[Any]:
    """The fields after another model was chosen."""
    return [gr.update(**one) for i in range(most) for one in _options(knobs, i, limit)]


def paint_tab(desk: Desk, places: Places, limits: Any, most: int) -> gr.Dropdown:
    """Builds the part; returns the menu of models.

    Args:
        most: stages of any model.
    """
    names = models(places)
    first = places.named(names[0]) if names else None
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = gr.Dropdown(names, value=names[0] if names else None, label="Model")
            caption = gr.Textbox(label="Caption", value=EXAMPLE, max_length=limits.longest)
            negative = gr.Textbox(
                label="Negative caption",
                info="Guidance leads away from it; some stage needs a guidance other than 1.",
                max_length=limits.longest,
            )
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
                n = gr.Number(
                    label="Number of pictures", value=1, precision=0, minimum=1, min_width=120,
                    maximum=limits.most_pictures,
                )  # fmt: skip
            with gr.Accordion("Guidance and steps of each stage", open=False):
                knobs = fields(most, limits.most_steps, knobs_of(first))
            with gr.Row():
                go = gr.Button("Paint", variant="primary", min_width=120)
                stop = gr.Button("Cancel", min_width=120)
        with gr.Column(scale=3, min_width=320):
            easel = gr.HTML(note("Nothing is painted yet."), elem_id="easel", padding=False)

    def chosen(name: str) -> list[Any]:
        try:
            found = knobs_of(places.named(name))
        except UserError:
            found = []
        return updates(found, most, limits.most_steps)

    async def paint(
        request: gr.Request, name: str, caption: str, negative: str, seed: int, n: int, *values: Any
    ) -> AsyncIterator[str]:
        try:
            place = places.named(name)
            sets = sets_of(place.knobs, values)
            asked = Painting(place, (caption,), negative, int(seed or 0), int(n or 1), sets)
        except UserError as error:
            yield note(str(error), "alert")
            return
        work = lambda engine, job: engine.paint(asked, job)  # noqa: E731
        async for page in desk.asked(request.session_hash, PART, work, painted):
            yield page

    def cancel(request: gr.Request) -> None:
        desk.cancel(request.session_hash, PART)

    model.change(chosen, model, knobs, **HIDDEN)
    inputs = [model, caption, negative, seed, n, *knobs]
    gr.on(
        [go.click, caption.submit, negative.submit], paint, inputs, easel,
        concurrency_limit=None, **HIDDEN,
    )  # fmt: skip
    stop.click(cancel, None, None, queue=False, **HIDDEN)
    return model
