"""Labelled grids of sample pictures."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _LINE = 8, 15  # pixels between cells, and from one line of text to the next


def to_uint8(pictures: Float[Tensor, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Convert pictures in [-1, 1] to bytes, channels last."""
    scaled = pictures.detach().float().cpu().clamp(-1, 1).add_(1).mul_(127.5)
    return scaled.round_().byte().permute(0, 2, 3, 1).numpy()


def grid(
    pictures: UInt8[np.ndarray, "n h w 3"],
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Draw pictures in rows of `columns`, with their captions wrapped beneath them.

    Args:
        scale: factor of enlargement, by repeating pixels. Cells are `scale * w` pixels wide, with
            8 pixels between them and around them.

    Raises:
        ValueError: there are not as many captions as pictures.
    """
    n, h, w, _ = pictures.shape
    if captions is not None and len(captions) != n:
        raise ValueError(f"{len(captions)} captions for {n} pictures")
    h, w = h * scale, w * scale
    font = ImageFont.load_default(12)
    texts = [_wrap(caption, font, w) for caption in captions or []]
    text_height = max((len(lines) for lines in texts), default=0) * _LINE
    rows = -(-n // columns)
    size = columns * (w + _GAP) + _GAP, rows * (h + text_height + _GAP) + _GAP
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        left, top = _GAP + column * (w + _GAP), _GAP + row * (h + text_height + _GAP)
        enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas.paste(Image.fromarray(enlarged), (left, top))
        for j, line in enumerate(texts[i] if texts else []):
            draw.text((left, top + h + 2 + j * _LINE), line, fill="#333a44", font=font)
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; wider words are split."""
    lines = [""]
    for word in re.findall(r"\S+", text):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
