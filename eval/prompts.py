"""Prompt files as the benchmarks publish them, and the folders that their scorers read.

A prompt keeps the other columns of its row, so that scores can be listed by category. A layout says
where picture k of prompt i lies: its id is its path without the ending.
"""

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from cascade.data.listing import one_line, table
from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.grids import grid

COLUMNS = ("prompt", "prompts", "caption", "text")
CATEGORIES = ("category", "challenge", "tag")  # of DrawBench, PartiPrompts, GenEval; in any case

_LONGEST = 255 - len("_000000.png")  # bytes of a prompt in a file's name


class Prompt(NamedTuple):
    """A prompt, and all columns of its row."""

    text: str
    fields: dict[str, Any] = {}

    @property
    def categories(self) -> dict[str, str]:
        """What scores can be listed by."""
        return {k: str(v) for k, v in self.fields.items() if k.lower() in CATEGORIES}


def read(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    `.jsonl` (GenEval's metadata), `.csv` (DrawBench) and `.tsv` (PartiPrompts, where a quote is a
    letter) have a column of them; a `.txt` has one a line, up to a tab (T2I-CompBench).

    Raises:
        UserError: the file is missing, damaged, has no such column, or an empty prompt.
    """
    if path.suffix.lower() in (".txt", ".tsv"):
        rows = _lines(path) if path.suffix.lower() == ".txt" else _tabs(path)
    else:
        rows = table(path)
    if not rows:
        raise UserError(f"{path} holds no prompt: write one on each line")
    known = {name.lower(): name for row in rows for name in row}
    column = next((known[name] for name in COLUMNS if name in known), None)
    if column is None:
        raise UserError(f"{path} has no column of prompts: call one {' or '.join(COLUMNS[:2])}")
    prompts = [Prompt(one_line(row.get(column)), dict(row)) for row in rows]
    if empty := [i for i, prompt in enumerate(prompts, 1) if not prompt.text]:
        raise UserError(f"{path}: prompt {empty[0]} is empty: write one, or remove its row")
    return prompts


def hash_of(prompts: Sequence[Prompt]) -> str:
    """Sixteen hexadecimal digits of all prompts and their columns."""
    text = json.dumps([[prompt.text, prompt.fields] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


def _lines(path: Path) -> list[dict[str, str]]:
    lines = (line.partition("\t")[0].strip() for line in _read_text(path).splitlines())
    return [{"prompt": line} for line in lines if line]


def _tabs(path: Path) -> list[dict[str, str]]:
    lines = csv.reader(_read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    header, *rows = [*lines] or [[]]
    if wrong := [i for i, row in enumerate(rows, 2) if row and len(row) != len(header)]:
        raise UserError(f"{path}: line {wrong[0]} has not the header's {len(header)} columns")
    return [dict(zip(header, row)) for row in rows if row]


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
            folder, text = out / f"{i:05d}", json.dumps(prompt.fields)
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
