"""The model card: a README with front matter, as hubs read it, and the hashes of all files."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.batch import image_size
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.weights import read_json
from cascade.errors import UserError
from cascade.eval.metrics.measures import EVALUATION, measures
from cascade.export.encoders import kind_of
from cascade.export.model import Part, parts_of, write_model
from cascade.nets.cost import parameters
from cascade.runs.cascade_file import CASCADE
from cascade.stage import WEIGHTS

README, SUMS, METRICS, ORIGIN = "README.md", "SHA256SUMS", "metrics.json", "origin.json"
UNKNOWN = "unknown"
_RATES = ("objects", "binding", "relations", "counts", "whole")


def write_card(model: Path, folder: Path, license: str | None = None) -> list[str]:
    """Writes a model as a folder of safetensors with a card; returns notes for the user.

    Args:
        model: the directory of a cascade, or its file.
        license: of the weights that were trained here, as model hubs name it (`apache-2.0`).
            Imported weights keep their own.

    Raises:
        UserError: a stage cannot be loaded, or the licence is no name of one.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UserError(f"--license {license}: give its name on model hubs, such as apache-2.0")
    parts = parts_of(model)
    notes = []
    licenses = {part.name: _license(part) or license or UNKNOWN for part in parts}
    if UNKNOWN in licenses.values():
        notes.append("the card says that the licence is unknown: add --license NAME to state it")
    folder.mkdir()
    encoders = write_model(parts, folder)
    where = model.parent if model.suffix == ".yaml" else model
    numbers = list(_numbers(where / METRICS))
    if numbers and _older(where, parts):
        numbers = []
        notes.append(
            f"{where / METRICS} is older than the weights, and is left out: run `cascade evaluate`"
        )
    name = where.resolve().name
    text = [*_front_matter(licenses), *_introduction(name, licenses), *_stages(parts, folder)]
    text += [*_encoders(encoders), *_section("Numbers", numbers), *_files()]
    (folder / README).write_text("\n".join(text) + "\n")
    (folder / SUMS).write_text("".join(f"{line}\n" for line in _sums(folder)))
    return notes


def _license(part: Part) -> str | None:
    """The licence of weights that were imported."""
    file = part.run.path / ORIGIN
    found = read_json(file).get("license") if file.is_file() else None
    return str(found) if found else None


def _older(where: Path, parts: Sequence[Part]) -> bool:
    own = [where / CASCADE, *(part.run.path / WEIGHTS for part in parts)]
    written = (where / METRICS).stat().st_mtime
    return any(path.exists() and path.stat().st_mtime > written for path in own)


def _front_matter(licenses: Mapping[str, str]) -> Iterator[str]:
    named = sorted(set(licenses.values()))
    yield "---"
    yield f"license: {named[0] if len(named) == 1 else 'other'}"
    yield "library_name: cascade"
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("text-to-image", "diffusion", "cascade", "unclip"))
    yield "---"


def _introduction(name: str, licenses: Mapping[str, str]) -> Iterator[str]:
    yield f"# {name}"
    yield ""
    yield "A cascade of generative models that paints pictures of captions. It needs Cascade alone:"
    yield ""
    yield "```"
    yield 'cascade sample --model FOLDER "a red circle above a blue square" --n 4'
    yield "```"
    yield ""
    if len(set(licenses.values())) > 1:
        yield from (f"* `{name}`: licence {license}" for name, license in licenses.items())
        yield ""


def _stages(parts: Sequence[Part], folder: Path) -> Iterator[str]:
    yield "## Stages"
    yield ""
    yield "| stage | gives | from | parameters | images seen | sampling | SHA-256 of the weights |"
    yield "|---|---|---|---|---|---|---|"
    for part in parts:
        seen = part.run.status().get("images")
        gives = part.stage.writes if part.sampled else "guidance of another stage"
        sampling = _choices(part) if part.sampled else ""
        digest = _digest(folder / part.name / WEIGHTS)[:16]
        reads = ", ".join(sorted(part.stage.reads))
        row = [part.name, gives, reads, f"{parameters(part.stage):,}", f"{seen:,}" if seen else ""]
        yield f"| {' | '.join([*row, sampling, digest])} |"
    yield ""


def _choices(part: Part) -> str:
    """The sampling choices of the cascade, and the sampler's own where it makes none."""
    own = {key: getattr(part.stage.sampler, key, None) for key in ("steps", "scale")}
    chosen = {**own, **(part.choices or {})}
    return ", ".join(f"{key} {value}" for key, value in chosen.items() if value is not None)


_KINDS = {"t5": "a T5", "llm": "a language model", "autoencoder": "an autoencoder"}


def _encoders(encoders: Mapping[str, Any]) -> Iterator[str]:
    if not encoders:
        return
    yield "## Encoders"
    yield ""
    for name, encoder in encoders.items():
        kind = _KINDS.get(kind_of(encoder) or "", encoder.name)
        if isinstance(encoder, FrozenCLIP):
            quick = encoder.choices["quick_gelu"]
            kind = f"a CLIP with {'QuickGELU' if quick else 'GELU'}"
        yield f"* `{name}/`: {kind}, hash {encoder.hash}"
    yield ""


def _numbers(file: Path) -> Iterator[str]:
    """A table of the cascade's measures, and how they were taken; empty without an evaluation."""
    if not file.is_file():
        return
    metrics = read_json(file)
    try:
        space = re.sub(r"of \S*/", "of ", str(metrics["features"]))
        names = {m.key: m.name for m in measures(EVALUATION)}
        yield (
            f"Seed {metrics['seed']}, one picture for each caption, without selection; Fréchet "
            f"distances between {space}. They are not FID, and compare only with each other."
        )
        if chosen := metrics.get("choices"):
            yield f"Measured with other sampling choices than the cascade's: {', '.join(chosen)}."
        yield ""
        yield "| captions | picture | measure | value | 95 % interval | n |"
        yield "|---|---|---|---|---|---|"
        for split in metrics["captions"]:
            for key, row in metrics[split].items():
                if image_size(key):
                    about = f"{split} ({metrics.get('captions_are', {}).get(split, '')})"
                    yield from (f"| {about} | {key} | {line} |" for line in _rows(row, names))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is no evaluation of a cascade: remove it") from error


def _rows(row: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    for key, name in names.items():
        if row.get(key) is not None:
            yield _row(name, row[key], row.get("intervals", {}).get(key), row["count"])
    for kind in ("one", "two"):
        for rate in _RATES if kind in row else ():
            if rate in row[kind]:
                own = row[kind]
                what = f"scenes with {kind}: {'all' if rate == 'whole' else rate} right"
                yield _row(what, own[rate], own["intervals"].get(rate), own["count"])


def _row(name: str, value: float, ends: Sequence[float] | None, n: int) -> str:
    interval = f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
    return f"{name} | {value:.3g} | {interval} | {n}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _files() -> list[str]:
    return [
        "## Files",
        "",
        f"All weights are safetensors. `sha256sum --check {SUMS}` compares every file.",
    ]


def _sums(folder: Path) -> Iterator[str]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"{_digest(path)}  {path.relative_to(folder).as_posix()}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
