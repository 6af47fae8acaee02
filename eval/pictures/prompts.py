"""Prompt files as benchmarks publish them, and the folder layouts that their scorers read.

A prompt keeps the other columns of its row, so that scores can be reported by category. A layout
maps picture k of prompt i to its id, which is its path without the ending.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layout:
    """Where pictures are saved.

    Args:
        name: on the command line.
        per_prompt: the benchmark's usual number of pictures per prompt.
        ids: (prompts, pictures of each) -> the ids of each prompt's pictures; raises UserError if
            the scorer could not read them.
        sheets: (number of prompts) -> ids of the extra pictures that `finish` writes, which do not
            belong to the set.
        finish: (folder, prompts, ids) -> None; writes the layout's other files, once all pictures
            are complete.
    """

    name: str
    per_prompt: int
    ids: Callable[[Sequence[Prompt], int], list[list[str]]]
    sheets: Callable[[int], set[str]] = lambda prompts: set()
    finish: Callable[[Path, Sequence[Prompt], Sequence[Sequence[str]]], None] = lambda *_: None


def _plain_ids(prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
    return [[f"{i:05d}_{k:04d}" for k in range(per_prompt)] for i in range(len(prompts))]


def _geneval_ids(prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
    for i, prompt in enumerate(prompts, 1):
        if not {"prompt", "tag", "include"} <= prompt.fields.keys():
            raise UserError(
                f"prompt {i} lacks tag and include: give GenEval's jsonl, or --layout plain"
            )
    return [[f"{i:05d}/samples/{k:04d}" for k in range(per_prompt)] for i in range(len(prompts))]


def _geneval_sheets(prompts: int) -> set[str]:
    return {f"{i:05d}/grid" for i in range(prompts)}


def _finish_geneval(out: Path, prompts: Sequence[Prompt], ids: Sequence[Sequence[str]]) -> None:
    for i, (prompt, names) in enumerate(zip(prompts, ids)):
        folder, text = out / f"{i:05d}", json.dumps(prompt.fields, default=str) + "\n"
        write_atomically(folder / "metadata.jsonl", partial(Path.write_text, data=text))
        if not (folder / "grid.png").exists():
            pictures = [np.asarray(_opened(out / f"{name}.png")) for name in names]
            sheet = grid(np.stack(pictures), columns=min(4, len(names)))
            write_atomically(folder / "grid.png", partial(sheet.save, format="PNG"))


def _compbench_ids(prompts: Sequence[Prompt], per_prompt: int) -> list[list[str]]:
    """Number the pictures across all prompts.

    The scorers read the prompt from the name, up to the first underscore. If prompts differ only in
    characters that file names cannot hold, the numbers keep their pictures distinct.
    """
    names = [_file_name(prompt.text) for prompt in prompts]
    return [
        [f"samples/{name}_{i * per_prompt + k:06d}" for k in range(per_prompt)]
        for i, name in enumerate(names)
    ]


def _file_name(text: str) -> str:
    name = " ".join(re.sub(r"[/_\0-\x1f\x7f]", " ", text).split()).lstrip(".")
    if not name or len(name.encode()) > _LONGEST:
        raise UserError(f"this prompt is no valid file name: {text[:60]}... : use --layout plain")
    return name


LAYOUTS = {
    layout.name: layout
    for layout in (
        # `00000_0000.png`: numbers of prompt and picture, in one folder
        Layout("plain", 1, _plain_ids),
        # `00000/samples/0000.png`, with `metadata.jsonl` and `grid.png` (djghosh13/geneval)
        Layout("geneval", 4, _geneval_ids, _geneval_sheets, _finish_geneval),
        # `samples/PROMPT_000000.png` (Karine-Huang/T2I-CompBench)
        Layout("compbench", 10, _compbench_ids),
    )
}


def _opened(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG",)).convert("RGB")
