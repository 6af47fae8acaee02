"""The part of the page that edits pictures."""

from typing import Any

import gradio as gr

from cascade.errors import UserError
from cascade.serve.asked import Editing, about_picture, choices_text, png
from cascade.serve.page.following import Asked, Desk
from cascade.serve.page.paint import HIDDEN, asks, stops
from cascade.serve.page.pieces import answered, copied, files, image, note
from cascade.serve.page.sent import decoded, number, text, whole
from cascade.serve.places import EDITS, Places

PART = "edit"
FRAMES, STEPS = 7, 50  # of a path, and of DDIM
JUMPS = 10  # times that each step can be taken
SHARE = 0.5  # of a difference of captions
_PATHS = ("interpolate", "change")
_TITLES = {kind: what[0].upper() + what[1:] for kind, what in EDITS.items()}

# A browser keeps the files that were chosen and what was painted over them; `page.js` sends them
# before the values of all fields.
_FILES = 3  # two pictures, and the brush's
_PICKER = """<div class="picker" data-name="{name}"><label>{label}
<input type="file" accept="image/*" class="pick"></label>
<p class="note told" role="status"></p>
<canvas class="board" tabindex="0" role="application" hidden
 aria-label="{label}: brush over the part to repaint. Arrow keys move the brush, the space
 bar lowers or lifts it."></canvas>
<p class="tools" hidden><label>Brush <input type="range" class="brush" min="2" max="40" value="12">
</label> <button type="button" class="tool wipe">Clear the brush</button></p></div>"""


def edit_tab(desk: Desk, places: Places, limits: Any, names: list[str]) -> gr.Dropdown:
    """Builds the part; returns the menu of models."""
    first = places.named(names[0]) if names else None
    kinds = first.edits if first else []
    kind_now = kinds[0] if kinds else None
    frames, steps = min(FRAMES, limits.most_pictures), min(STEPS, limits.most_steps)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = gr.Dropdown(names, value=names[0] if names else None, label="Model of the edit")
            kind = gr.Radio(
                [(_TITLES[one], one) for one in kinds], value=kind_now, label="Kind of edit"
            )
            gr.HTML(_PICKER.format(name="first", label="Picture"), padding=False)
            with gr.Group(visible=kind_now == "interpolate") as of_two:
                gr.HTML(_PICKER.format(name="second", label="Second picture"), padding=False)
            caption = gr.Textbox(
                label="Caption of the result", max_length=limits.longest,
                info="Needed to paint a part anew, or beyond the edges.",
            )  # fmt: skip
            with gr.Group(visible=kind_now == "change") as of_change:
                before = gr.Textbox(label="From this caption", max_length=limits.longest)
                to = gr.Textbox(label="To this caption", max_length=limits.longest)
                share = gr.Slider(0.05, 1, SHARE, step=0.05, label="Largest share")
            with gr.Group(visible=kind_now == "vary") as of_vary:
                own = gr.Checkbox(label="Start from the picture's own noise")
                eta = gr.Slider(
                    0, 1, 0.6, step=0.05, label="Eta",
                    info="With its own noise: 0 paints the same picture, 1 varies it most.",
                )  # fmt: skip
            with gr.Row(visible=kind_now == "outpaint") as of_sides:
                sides = [
                    gr.Number(
                        label=f"Pixels {where}", value=0, precision=0, minimum=0, min_width=90
                    )
                    for where in ("left", "right", "above", "below")
                ]
            with gr.Group(visible=kind_now in ("inpaint", "outpaint")) as of_jumps:
                jumps = gr.Slider(1, JUMPS, 5, step=1, label="Times to take each step")
            with gr.Row():
                seed = gr.Number(
                    label="Seed of the edit", value=0, precision=0, minimum=0, min_width=120
                )
                n = gr.Number(
                    label="Number of results", value=1, precision=0, minimum=1, min_width=120,
                    maximum=limits.most_pictures,
                )  # fmt: skip
            with gr.Row():
                go = gr.Button("Edit", variant="primary", min_width=120)
                stop = gr.Button("Cancel the edit", min_width=120)
        with gr.Column(scale=3, min_width=320):
            empty = answered(PART, note("Choose a picture to edit."))
            gr.HTML(empty, elem_id="edited", padding=False)

    def chosen(name: str) -> Any:
        try:
            found = places.named(name).edits
        except UserError:
            found = []
        value = found[0] if found else None
        return gr.update(choices=[(_TITLES[one], one) for one in found], value=value)

    def shown(kind: str | None) -> list[Any]:
        wanted = ("interpolate",), ("change",), ("vary",), ("outpaint",), ("inpaint", "outpaint")
        return [gr.update(visible=kind in of) for of in wanted]

    def asked(
        first: object, second: object, mask: object, name: str, kind: str, caption: object,
        before: object, to: object, share: object, own: bool, eta: object, jumps: object,
        left: object, right: object, top: object, bottom: object, seed: object, n: object,
    ) -> Asked:  # fmt: skip
        options: dict[str, Any] = {"frames": frames} if kind in _PATHS else {}
        if kind in _PATHS or (kind == "vary" and own):
            options |= {"steps": steps}
        if kind == "change":
            if not text(to).strip():
                raise UserError("say in a caption what the picture is to change to")
            most = number(share, "share", 0, 1)
            options |= {
                "to": text(to),
                "from": text(before),
                "share": 0.5 if most is None else most,
            }
        if kind == "vary" and own:
            options |= {"eta": number(eta, "eta", 0, 1) or 0.0}
        if kind == "outpaint":
            added = {"left": left, "right": right, "top": top, "bottom": bottom}
            options |= {side: whole(of, f"pixels {side}") or 0 for side, of in added.items()}
        if kind in ("inpaint", "outpaint"):
            options |= {"jumps": whole(jumps, "times of each step", 1, JUMPS) or 1}
        pictures = [decoded(first), *([decoded(second)] if kind == "interpolate" else [])]
        editing = Editing(
            places.named(name), str(kind), tuple(pictures), text(caption).strip(),
            decoded(mask) if kind == "inpaint" else b"", whole(seed, "seed") or 0,
            whole(n, "number of results", 1) or 1, options=options,
        )  # fmt: skip

        def work(engine: Any, job: Any) -> Any:
            from cascade.serve.editing import edit

            return edit(engine, editing, job)

        return Asked(work, edited)

    inputs = [model, kind, caption, before, to, share, own, eta, jumps, *sides, seed, n]
    desk.parts[PART] = _FILES + len(inputs), asked
    groups = [of_two, of_change, of_vary, of_sides, of_jumps]
    model.change(chosen, model, kind, **HIDDEN)
    kind.change(shown, kind, groups, **HIDDEN)
    go.click(inputs=inputs, **asks(PART))
    stop.click(**stops(PART))
    return model


def edited(done: Any) -> str:
    """What was made (`editing.Edited`): results to save, or paths with a slider."""
    command, choices, asked = done.asked.command(), choices_text(done.choices), done.asked
    about = about_picture(command, choices, asked.caption, asked.seed, 0)
    if len(done.shares) > 1:
        parts = [path(row, done.shares, about, i) for i, row in enumerate(done.rows)]
    else:
        flat = [picture for row in done.rows for picture in row]
        titles = [asked.caption or _TITLES[asked.kind]] * len(flat)
        parts = [files(flat, titles, [about] * len(flat), asked.kind)]
    return "".join([*parts, copied(command, "Command line"), copied(choices, "Sampling choices")])


def path(row: Any, shares: Any, about: Any, number: int) -> str:
    """The frames of a path, of which a slider shows one at once."""
    frames = "".join(
        f'<div class="frame"{" hidden" if i else ""}>{image(png(one, about), f"share {share:.2f}")}'
        f"<p>Share {share:.2f}</p></div>"
        for i, (one, share) in enumerate(zip(row, shares))
    )
    return (
        f'<div class="path sheet"><div>{frames}<label>Share of path {number + 1} '
        f'<input type="range" class="along" min="0" max="{len(row) - 1}" value="0" step="1">'
        "</label></div></div>"
    )
