"""What a visitor asks for, and the command line that does the same."""

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cascade.serve.places import Place


@dataclass(frozen=True)
class Painting:
    """Pictures of captions.

    Attributes:
        place: a model or a run.
        captions: what to paint, one picture of each in each of `n` rows.
        sets: sampling choices that differ from the model's own, as "stage.option=value".
    """

    place: Place
    captions: tuple[str, ...]
    negative: str = ""
    seed: int = 0
    n: int = 1
    sets: tuple[str, ...] = ()

    def command(self) -> str:
        """The command line that paints the same pictures."""
        words = ["cascade", "sample", "--model", self.place.name, *self.captions]
        words += ["--n", str(self.n), "--seed", str(self.seed)]
        words += ["--negative", self.negative] if self.negative else []
        words += [word for one in self.sets for word in ("--set", one)]
        return shlex.join([*words, "--out", "out.png"])


@dataclass(frozen=True)
class Editing:
    """An edit of one picture, or of two.

    Attributes:
        kind: of `cascade edit`.
        options: of that kind, by name.
        pictures: the files' contents.
        mask: the contents of a picture that is white where to repaint.
    """

    place: Place
    kind: str
    pictures: tuple[bytes, ...]
    caption: str = ""
    mask: bytes = b""
    seed: int = 0
    n: int = 1
    sets: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def command(self) -> str:
        """The command line that makes the same edit, of files that the visitor has."""
        names = [f"picture{i}.png" for i in range(1, len(self.pictures) + 1)]
        words = ["cascade", "edit", self.kind, "--model", self.place.name, "--picture", *names]
        words += ["--caption", self.caption] if self.caption else []
        words += ["--mask", "mask.png"] if self.mask else []
        for name, value in self.options.items():
            words += [f"--{name}", str(value)]
        words += ["--n", str(self.n), "--seed", str(self.seed)]
        words += [word for one in self.sets for word in ("--set", one)]
        return shlex.join([*words, "--out", "out.png"])


def choices_text(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Sampling choices as they stand in a cascade.yaml."""
    lines = ["stages:"]
    for name, choices in stages.items():
        told = ", ".join(f"{option}: {json.dumps(value)}" for option, value in choices.items())
        lines.append(f"  {name}: {{{told}}}")
    return "\n".join(lines) + "\n"


def png(picture: Any, about: Mapping[str, str] | None = None) -> bytes:
    """A picture [h, w, 3] as a PNG, whose text chunks say how it was made."""
    chunks = PngInfo()
    for key, text in (about or {}).items():
        chunks.add_itxt(f"cascade.{key}", text)
    out = io.BytesIO()
    # Previews are sent often, and small files save less time than packing them takes.
    Image.fromarray(picture).save(out, "PNG", pnginfo=chunks, compress_level=1)
    return out.getvalue()


def jpeg(picture: Any) -> bytes:
    """A picture [h, w, 3] as a small JPEG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=80)
    return out.getvalue()


def about_picture(
    command: str, choices: str, caption: str, seed: int, number: int
) -> dict[str, str]:
    """What the file of one picture tells (`png`)."""
    told: Sequence[tuple[str, Any]] = (
        ("command", command),
        ("choices", choices),
        ("caption", caption),
        ("seed", seed),
        ("picture", number),
    )
    return {key: str(value) for key, value in told}
