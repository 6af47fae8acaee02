"""Prompt files as the benchmarks publish them, and the folders that their scorers read.

A prompt keeps the other columns of its row, so that scores can be listed by category. A layout says
where picture k of prompt i lies: its id is its path without the ending.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from cascade.data.tables import table, text_column
from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.grids import grid
from cascade.texts import brief, one_line

CATEGORIES = ("category", "challenge", "tag")  # of DrawBench, PartiPrompts, GenEval; in any case

_ID = re.compile(r"\S+|\S.*\.\w+")  # with spaces only if it is a file's name
_LONGEST = 255 - len("_000000.png")  # bytes of a prompt in a file's name


class Prompt(NamedTuple):
    """A prompt, and all columns of its row."""

    text: str
    fields: dict[str, Any] = {}

    @property
    def categories(self) -> dict[str, str]:
        """What scores can be listed by."""
        return {k: str(v) for k, v in self.fields.items() if k.lower() in CATEGORIES}

    @property
    def kept(self) -> dict[str, str]:
        """What is said of its pictures: the categories, and its own id as `prompt_id`."""
        own = {"prompt_id": str(self.fields["id"])} if "id" in self.fields else {}
        return {**self.categories, **own}


def read(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order; `eval.captions` reads the same forms, with ids.

    `.jsonl` (GenEval's metadata), `.csv` (DrawBench), `.tsv` (PartiPrompts) and `.parquet` have a
    column of them; a `.txt` has one a line, or an id, a tab and a prompt.

    Raises:
        UserError: the file is missing, damaged, has no such column or two, an empty prompt, or what
            stands before the tabs are no ids.
    """
    rows = table(path)
    column = text_column(path, rows)
    if column is None:
        raise UserError(f"{path} has no column of prompts: call one prompt or caption")
    if path.suffix.lower() == ".txt" and "id" in rows[0]:
        _check_ids(path, [row["id"] for row in rows])
    prompts = [Prompt(one_line(row.get(column)), dict(row)) for row in rows]
    if empty := [i for i, prompt in enumerate(prompts, 1) if not prompt.text]:
        raise UserError(f"{path}: prompt {empty[0]} is empty: write one, or remove its row")
    return prompts


def _check_ids(path: Path, ids: Sequence[str]) -> None:
    """Raises UserError where a prompt, and not an id, may stand before the tab."""
    several = [name for name, n in Counter(ids).items() if n > 1]
    if wrong := several or [name for name in ids if not _ID.fullmatch(name.strip())]:
        raise UserError(
            f"{path}: {brief(wrong[0])!r} before a tab is no id of its own: write an id, a tab and "
            "a prompt on each line, or prompts alone"
        )


def hash_of(prompts: Sequence[Prompt]) -> str:
    """Sixteen hexadecimal digits of all prompts and their columns."""
    pairs = [[prompt.text, prompt.fields] for prompt in prompts]
    text = json.dumps(pairs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@runtime_checkable
class Layout(Protocol):
    """Where pictures go: it has a `name`, and as many pictures `per_prompt` as is usual there."""

    name: str
    per_prompt: int

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        """Those of each prompt's pictures. UserError where the scorer could not read them."""

    def sheets(self, prompts: int) -> set[str]:
        """Ids of pictures that `finish` makes, which are none of the set."""

    def finish(self, out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
        """Writes what belongs beside the pictures, when all of them are there."""


@dataclass(frozen=True)
class Plain:
    """`00000_0000.png`: prompt and picture, in one folder."""

    name = "plain"
    per_prompt = 1

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        return [[f"{i:05d}_{k:04d}" for k in range(per_prompt)] for i in range(len(prompts))]

    def sheets(self, prompts: int) -> set[str]:
        return set()

    def finish(self, out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
        pass


@dataclass(frozen=True)
class GenEval:
    """`00000/samples/0000.png`, with `metadata.jsonl` and `grid.png` (djghosh13/geneval)."""

    name = "geneval"
    per_prompt = 4

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        for i, prompt in enumerate(prompts, 1):
            if not {"prompt", "tag", "include"} <= prompt.fields.keys():
                raise UserError(
                    f"prompt {i} lacks tag and include: give GenEval's jsonl, or --layout plain"
                )
        return [
            [f"{i:05d}/samples/{k:04d}" for k in range(per_prompt)] for i in range(len(prompts))
        ]

    def sheets(self, prompts: int) -> set[str]:
        return {f"{i:05d}/grid" for i in range(prompts)}

    def finish(self, out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
        for i, (prompt, names) in enumerate(zip(prompts, ids)):
            folder, text = out / f"{i:05d}", json.dumps(prompt.fields, default=str)
            write_atomically(folder / "metadata.jsonl", partial(_write, text=text))
            if not (folder / "grid.png").exists():
                pictures = [np.asarray(_opened(out / f"{name}.png")) for name in names]
                sheet = grid(np.stack(pictures), columns=min(4, len(names)))
                write_atomically(folder / "grid.png", partial(sheet.save, format="PNG"))


@dataclass(frozen=True)
class CompBench:
    """`samples/PROMPT_000000.png`, counted through all prompts (Karine-Huang/T2I-CompBench).

    Its scorers take the name up to the first underscore for the prompt. Where prompts differ in
    what cannot stand in a name alone, their numbers tell the pictures apart.
    """

    name = "compbench"
    per_prompt = 10

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        names = [self._name(prompt.text) for prompt in prompts]
        return [
            [f"samples/{name}_{i * per_prompt + k:06d}" for k in range(per_prompt)]
            for i, name in enumerate(names)
        ]

    @staticmethod
    def _name(text: str) -> str:
        name = " ".join(re.sub(r"[/_\0-\x1f\x7f]", " ", text).split()).lstrip(".")
        if not name or len(name.encode()) > _LONGEST:
            raise UserError(f"this prompt is no file name: {text[:60]}... : use --layout plain")
        return name

    def sheets(self, prompts: int) -> set[str]:
        return set()

    def finish(self, out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
        pass


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Plain(), GenEval(), CompBench())}


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n")


def _opened(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG",)).convert("RGB")
