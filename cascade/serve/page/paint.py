"""The part of the page that paints captions."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from cascade.errors import UserError
from cascade.serve.asked import Painting
from cascade.serve.page.following import Asked, Desk
from cascade.serve.page.pieces import answered, note, painted
from cascade.serve.page.sent import number, text, whole
from cascade.serve.places import Knob, Place, Places

PART = "paint"
# Gradio's own queue is not used: it is slow, and what takes time waits in the line of jobs.
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
HIGHEST = 100  # guidance
EXAMPLE = "a red circle above a blue square"


def asks(part: str) -> dict[str, Any]:
    """Options of an event that asks for a part's work, which `page.js` does without Gradio."""
    return {"fn": None, "js": f"(...values) => window.cascade.ask({part!r}, values)", **HIDDEN}


def stops(part: str) -> dict[str, Any]:
    """Options of an event that cancels a part's work."""
    return {"fn": None, "js": f"() => window.cascade.stop({part!r})", **HIDDEN}


def models(places: Places) -> list[str]:
    """The names of what paints captions, models first."""
    return [name for name, place in places.found().items() if place.paints]


def knobs_of(place: Place | None) -> list[Knob]:
    try:
        return place.knobs if place else []
    except UserError:
        return []


def sets_of(knobs: Sequence[Knob], values: Sequence[object]) -> tuple[str, ...]:
    """The sampling choices that differ from the model's own.

    Args:
        values: guidance and steps of each stage, in turn.

    Raises:
        UserError: one of them is no such number.
    """
    sets = []
    for knob, given, count in zip(knobs, values[::2], values[1::2]):
        scale = number(given, f"guidance of {knob.stage}", 0, HIGHEST)
        steps = whole(count, f"steps of {knob.stage}", 1)
        if scale is not None and scale != knob.scale:
            sets.append(f"{knob.stage}.scale={scale:g}")
        if steps is not None and steps != knob.steps:
            sets.append(f"{knob.stage}.steps={steps}")
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
        {"label": f"{knob.stage}: guidance", "value": knob.scale, "minimum": 0, "maximum": HIGHEST}
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
            empty = answered(PART, note("Nothing is painted yet."))
            gr.HTML(empty, elem_id="easel", padding=False)

    def chosen(name: str) -> list[Any]:
        try:
            found = knobs_of(places.named(name))
        except UserError:
            found = []
        return updates(found, most, limits.most_steps)

    def asked(
        name: str, caption: object, negative: object, seed: object, n: object, *values: object
    ) -> Asked:
        place = places.named(name)
        painting = Painting(
            place, (text(caption),), text(negative), whole(seed, "seed") or 0,
            whole(n, "number of pictures", 1) or 1, sets_of(place.knobs, values),
        )  # fmt: skip
        return Asked(lambda engine, job: engine.paint(painting, job), painted)

    model.change(chosen, model, knobs, **HIDDEN)
    inputs = [model, caption, negative, seed, n, *knobs]
    desk.parts[PART] = len(inputs), asked
    gr.on([go.click, caption.submit, negative.submit], inputs=inputs, **asks(PART))
    stop.click(**stops(PART))
    return model
