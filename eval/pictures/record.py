"""A number with its protocol: pictures, reference, features, sampling, interval and warnings.

Two numbers are comparable only if everything but the pictures is equal.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from cascade.errors import UserError
from cascade.files.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number. Fields are None if they do not apply or are unknown.

    Attributes:
        name: of the measure, followed by the category if it covers only one.
        interval: 95 % confidence interval over the pictures.
        std: over subsets or splits, where reporting it is the measure's convention.
        count, pictures, pictures_hash, format, size: of the measured set.
        reference, reference_count, reference_hash: of a set, or of a file of statistics.
        extractor, extractor_hash, resize: of the feature space.
        guidance, steps: by stage.
        weights: "EMA" for averaged weights.
        model_hash: of all stages' weights and sampling choices.
        captions_hash: of ids and captions.
        warnings: to be shown wherever the number is.

    Raises:
        UserError: the value is not finite.
    """

    name: str
    value: float
    count: int
    pictures: str
    pictures_hash: str
    format: str
    size: str
    interval: tuple[float, float] | None = None
    std: float | None = None
    reference: str | None = None
    reference_count: int | None = None
    reference_hash: str | None = None
    extractor: str | None = None
    extractor_hash: str | None = None
    resize: str | None = None
    guidance: dict[str, float] | None = None
    steps: dict[str, int] | None = None
    weights: str | None = None
    model_hash: str | None = None
    prompts_hash: str | None = None
    captions_hash: str | None = None
    seed: int | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise UserError(f"{self.name} is {self.value}: look for damaged weights or pictures")

    @property
    def words(self) -> str:
        """The number and its protocol in one line."""
        against = ""
        if self.reference:
            count = "?" if self.reference_count is None else f"{self.reference_count:,}"
            against = f" vs {count} ({self.reference}, {self.reference_hash})"
        of = [
            self.extractor and f"{self.extractor} ({self.extractor_hash})",
            f"n = {self.count:,} ({self.pictures}, {self.pictures_hash}){against}",
            self.resize,
            f"{self.format}, {self.size}",
            self.guidance and f"guidance {_by_stage(self.guidance)}",
            self.steps and f"steps {_by_stage(self.steps)}",
            self.weights and f"weights {self.weights} ({self.model_hash})",
            self.captions_hash and f"captions {self.captions_hash}",
            None if self.seed is None else f"seed {self.seed}",
        ]
        warnings = "".join(f"; beware: {warning}" for warning in self.warnings)
        return f"{self.short} {self.number} ({', '.join(filter(None, of))}{warnings})"

    @property
    def short(self) -> str:
        """The name without the feature space."""
        return self.name.removesuffix(f" ({self.extractor})")

    @property
    def number(self) -> str:
        """The value with its interval or deviation."""
        spread = f" ± {self.std:.2g}" if self.std is not None else ""
        if self.interval:
            low, high = self.interval
            spread = f" [{low:.4g}, {high:.4g}]"
        return f"{self.value:.4g}{spread}"


def _by_stage(values: dict[str, float] | dict[str, int]) -> str:
    return " ".join(f"{stage}={value:g}" for stage, value in values.items())


COLUMNS = ("measure", "value", "95 %", "pictures", "reference", "features", "beware")


def rows(records: Iterable[Record]) -> list[list[str | float | None]]:
    """The cells of `COLUMNS`, for a page."""
    return [
        [
            record.name,
            record.value,
            None if not record.interval else "{:.4g} to {:.4g}".format(*record.interval),
            f"{record.count:,}",
            None if record.reference_count is None else f"{record.reference_count:,}",
            record.extractor,
            "; ".join(record.warnings),
        ]
        for record in records
    ]


def tables(records: Iterable[Record]) -> list[Table]:
    """Tables for the terminal, one for each feature space."""
    out: dict[str, Table] = {}
    for record in records:
        space = f"{record.extractor}, {record.resize}"
        if space not in out:
            out[space] = Table(title=space, title_justify="left")
            for column in ("measure", "value", "pictures", "reference", "beware"):
                out[space].add_column(column, no_wrap=column != "beware")
        against = "–" if record.reference_count is None else f"{record.reference_count:,}"
        beware = "; ".join(record.warnings)
        out[space].add_row(record.short, record.number, f"{record.count:,}", against, beware)
    return list(out.values())


def save(records: Sequence[Record], notes: Sequence[str], path: Path) -> None:
    """Writes records, and notes about conversions of pictures, as JSON."""
    found = {"records": [asdict(record) for record in records], "notes": list(notes)}
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text))
