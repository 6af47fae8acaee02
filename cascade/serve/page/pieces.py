"""Pieces of the page in HTML. Whatever is not ours is escaped here."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from itertools import count
from typing import Any

from cascade.serve.asked import about_picture, choices_text, jpeg, png

EXACT, LARGEST_SO_FAR = 64, 256  # pixels, the longer side of pictures as they are denoised


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A picture within the page: nothing of a visitor is kept on the server, or has an address."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def image(data: bytes, alt: str, kind: str = "image/png") -> str:
    """A picture, which is there at once where it takes the place of another."""
    return f'<img src="{data_url(data, kind)}" alt="{escape(alt, quote=True)}" decoding="sync">'


_answers = count()


def answered(part: str, html: str) -> str:
    """Where the page shows what it was told of a part; `page.js` puts later answers there."""
    return f'<div class="answer" data-part="{part}" data-answer="{next(_answers)}">{html}</div>'


def note(text: str, kind: str = "status") -> str:
    """One line that says what happens, or ("alert") what went wrong.

    Each has a number of its own: Gradio does not draw what it drew before, and a second refusal
    would look as if nothing had been done.
    """
    return f'<p class="note" role="{kind}" data-answer="{next(_answers)}">{escape(text)}</p>'


def bar(share: float, text: str) -> str:
    """How far a request is."""
    percent = round(100 * share)
    return (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><i style="width:{percent}%"></i></div>'
        + note(text)
    )


def copied(text: str, label: str) -> str:
    """A text with a button that copies it."""
    return (
        f'<div class="copied"><h2>{escape(label)}</h2><button type="button" class="copy">Copy'
        f'<span class="hidden"> {escape(label)}</span></button>'
        f'<pre tabindex="0" aria-label="{escape(label, quote=True)}">{escape(text)}</pre></div>'
    )


def so_far(pictures: Any, first: int) -> str:
    """Pictures [n, h, w, 3] as they are denoised, from the number `first` on.

    They are sent a few times in a second, and soon replaced: large ones are made smaller and lose
    details.
    """
    step = -(-max(pictures.shape[1:3]) // LARGEST_SO_FAR)
    small = max(pictures.shape[1:3]) <= EXACT
    pack, kind = (png, "image/png") if small else (jpeg, "image/jpeg")
    found = (
        image(pack(picture[::step, ::step]), f"picture {i} so far", kind)
        for i, picture in enumerate(pictures, first + 1)
    )
    return f'<div class="sheet">{"".join(found)}</div>'


def files(
    pictures: Sequence[Any], captions: Sequence[str], about: Sequence[Mapping[str, str]], name: str
) -> str:
    """Pictures that can be opened and saved; their files tell `about` them."""
    found = []
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        data = png(picture, about[i])
        file, alt = f"{name}-{i + 1}.png", escape(f"{caption} ({i + 1})", quote=True)
        found.append(
            f'<figure><button type="button" class="open" aria-label="Open {alt}">'
            f"{image(data, f'{caption} ({i + 1})')}</button>"
            f'<figcaption><button type="button" class="save" data-file="{file}">Save'
            f'<span class="hidden"> picture {i + 1} of {escape(name)}</span></button>'
            "</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(found)}</div>'


def painted(done: Any) -> str:
    """What was painted (`engine.Painted`): its pictures, all stages, and how to do it again."""
    command, choices, seed = done.asked.command(), choices_text(done.choices), done.asked.seed
    about = [
        about_picture(command, choices, caption, seed, number)
        for number, caption in enumerate(done.captions)
    ]
    *earlier, last = done.stages
    parts = [files(done.stages[last], done.captions, about, last)]
    for key in earlier:
        inner = files(done.stages[key], done.captions, about, key)
        parts.append(f"<details><summary>What {key} painted</summary>{inner}</details>")
    parts += [copied(command, "Command line"), copied(choices, "Sampling choices")]
    return "".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table that scrolls within the page."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
