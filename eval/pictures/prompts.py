"""Prompt files as benchmarks publish them, and the folder layouts that their scorers read.

A prompt keeps the other columns of its row, so that scores can be reported by category. A layout
maps picture k of prompt i to its id, which is its path without the ending.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cascade.errors import UserError
from cascade.files.atomic import write_atomically
from cascade.formats.tables import table, text_column
from cascade.formats.texts import brief, one_line
from cascade.grids import grid

CATEGORIES = ("category", "challenge", "tag")  # of DrawBench, PartiPrompts, GenEval; in any case

_ID = re.compile(r"\S+|\S.*\.\w+")  # spaces are allowed in file names only
_LONGEST = 255 - len("_000000.png")  # bytes of a prompt in a file name


class Prompt(NamedTuple):
    """A prompt, and all columns of its row."""

    text: str
    fields: dict[str, Any] = {}

    @property
    def categories(self) -> dict[str, str]:
        """The columns by which scores can be reported."""
        return {k: str(v) for k, v in self.fields.items() if k.lower() in CATEGORIES}

    @property
    def kept(self) -> dict[str, str]:
        """The fields that its pictures inherit: the categories, and its own id as `prompt_id`."""
        own = {"prompt_id": str(self.fields["id"])} if "id" in self.fields else {}
        return {**self.categories, **own}


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order.

    `.jsonl` (GenEval's metadata), `.csv` (DrawBench), `.tsv` (PartiPrompts) and `.parquet` files
    have a column of prompts; a `.txt` has one per line, or an id, a tab and a prompt.

    Raises:
        UserError: the file is missing or damaged, has no or several columns of prompts, or an empty
            prompt, or the texts before tabs are not ids.
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
    """Raises UserError if a text before a tab may be a prompt instead of an id."""
    several = [name for name, n in Counter(ids).items() if n > 1]
    if wrong := several or [name for name in ids if not _ID.fullmatch(name.strip())]:
        raise UserError(
            f"{path}: {brief(wrong[0])!r} before a tab is not a unique id: write an id, a tab and "
            "a prompt on each line, or prompts alone"
        )


def hash_of(prompts: Sequence[Prompt]) -> str:
    """Sixteen hexadecimal digits of all prompts and their columns."""
    pairs = [[prompt.text, prompt.fields] for prompt in prompts]
    text = json.dumps(pairs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Layout:
    """Where pictures are saved.

    Attributes:
        name: on the command line.
        per_prompt: the benchmark's usual number of pictures per prompt.
    """

    name: str
    per_prompt: int

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        """The ids of each prompt's pictures. UserError if the scorer could not read them."""
        raise NotImplementedError

    def sheets(self, prompts: int) -> set[str]:
        """Ids of the extra pictures that `finish` writes, which do not belong to the set."""
        return set()

    def finish(self, out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
        """Writes the layout's other files, once all pictures are complete."""


class Plain(Layout):
    """`00000_0000.png`: numbers of prompt and picture, in one folder."""

    name = "plain"
    per_prompt = 1

    def ids(self, prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
        return [[f"{i:05d}_{k:04d}" for k in range(per_prompt)] for i in range(len(prompts))]


class GenEval(Layout):
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
            folder, text = out / f"{i:05d}", json.dumps(prompt.fields, default=str) + "\n"
            write_atomically(folder / "metadata.jsonl", partial(Path.write_text, data=text))
            if not (folder / "grid.png").exists():
                pictures = [np.asarray(_opened(out / f"{name}.png")) for name in names]
                sheet = grid(np.stack(pictures), columns=min(4, len(names)))
                write_atomically(folder / "grid.png", partial(sheet.save, format="PNG"))


class CompBench(Layout):
    """`samples/PROMPT_000000.png`, numbered across all prompts (Karine-Huang/T2I-CompBench).

    Its scorers read the prompt from the name, up to the first underscore. If prompts differ only in
    characters that file names cannot hold, the numbers keep their pictures distinct.
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
            raise UserError(
                f"this prompt is no valid file name: {text[:60]}... : use --layout plain"
            )
        return name


LAYOUTS = {layout.name: layout for layout in (Plain(), GenEval(), CompBench())}


def _opened(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG",)).convert("RGB")
