"""The report of a cascade: targets, samples, curves and tables, from metrics and pictures.

Rates and costs are followed by their 95 % interval. `n` is the number of pictures or captions.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from cascade.batch import Batch, image_size
from cascade.data.tars.splits import described
from cascade.eval.cascades import sections
from cascade.eval.cascades.attribution import sentence
from cascade.eval.cascades.protocol import KINDS, PHRASINGS, Metrics, rate, within
from cascade.eval.metrics import measures
from cascade.eval.metrics.measures import CLIP_SCORE, FRECHET, Measure
from cascade.eval.pages.report import Report
from cascade.grids import grid, to_uint8
from cascade.runs.run import METRICS, Run

RATES = ("whole", "objects", "binding", "counts", "relations")


def write_report(path: Path, model: Path, metrics: Metrics, shown: dict[str, Batch]) -> None:
    """Writes the report to `path`.

    Args:
        model: directory of the cascade, for the loss curves of its stages.
        metrics: the content of metrics.json.
        shown: some generated pictures with their captions by split, the true ones as "truth", some
            at few "steps", attacked ones as "typographic", edited ones as "edits", and steered
            ones as "control".
    """
    report = Report("Cascade: from captions to pictures")
    space = metrics["features"]
    report.paragraph(
        f"One picture for each of the {_whose(metrics)}, without selection, seed "
        f"{metrics['seed']}. Distances are Fréchet distances between {space}. They are not FID, "
        "which is defined by Inception features, and compare only with each other."
    )
    if "targets" in metrics:
        report.heading("Targets")
        columns = itemgetter("what", "asked", "measured", "reached")
        report.targets(list(map(columns, metrics["targets"])))
    for split, batch in shown.items():
        titles = {
            "truth": "True pictures of the same captions",
            "steps": "In few steps",
            "typographic": "Pictures with a wrong word, and their variations",
            "edits": "Text differences of the style, and the true pictures",
            "control": "Without a condition, and for each condition: it, and what it steers",
        }
        report.heading(titles.get(split, f"Generated: {split}"))
        _pictures(report, batch, columns=4 if split == "steps" else 6)
    report.heading("Measures by size")
    for split in metrics["captions"]:
        _by_size(report, split, metrics[split], metrics["real_halves"])
    report.heading("Guidance")
    _guidance(report, metrics["guidance"])
    report.heading("Cost of each stage")
    _attribution(report, metrics["attribution"])
    _stages(report, metrics)
    if "prior" in metrics:
        report.heading("The prior")
        sections.of_prior(report, metrics["prior"], described(next(iter(metrics["captions"]))))
    if "concepts" in metrics:
        report.heading("Concepts and styles")
        sections.concepts(report, metrics["concepts"])
    if "typographic" in metrics:
        report.heading("Typographic attack")
        sections.typographic(report, metrics["typographic"])
    if "bound" in metrics:
        report.heading("Variational bound")
        bits = metrics["bound"]["bits_per_dimension"]
        report.paragraph(f"For ancestral samplers of {metrics['bound']['steps']} steps.")
        report.table(["stage", "bits per dimension"], [list(row) for row in bits.items()])
    if "geneval" in metrics:
        report.heading("GenEval on scenes")
        sections.geneval(report, metrics["geneval"])
    if "edits" in metrics:
        report.heading("Edits of pictures")
        sections.edits(report, metrics["edits"])
    if "control" in metrics:
        report.heading("Control")
        sections.control(report, metrics["control"])
    report.heading("Training")
    for run in sorted(model.glob(f"*/{METRICS}")):
        report.losses(run, run.parent.name)
        _over_time(report, Run(run.parent).samples)
    report.save(path)


def _whose(metrics: Metrics) -> str:
    """What the captions are, such as "held-out captions"."""
    return "; ".join(dict.fromkeys(described(split) for split in metrics["captions"]))


def _pictures(report: Report, batch: Batch, columns: int) -> None:
    keys = list(filter(image_size, batch))
    largest = max(keys, key=lambda key: batch[key].shape[-1])
    pictures = to_uint8(batch[largest])
    side = pictures.shape[1]
    shown = pictures[:, :: max(1, side // 128), :: max(1, side // 128)]
    sheet = grid(shown, columns=columns, captions=batch["caption"], scale=max(1, 128 // side))
    report.picture(sheet, f"{largest}, shown at {shown.shape[1] * max(1, 128 // side)} px")


def _found(rows: Sequence[Metrics]) -> list[Measure]:
    """The measures that some of the rows have."""
    return [m for m in measures.measures(measures.EVALUATION) if any(m.key in row for row in rows)]


def _by_size(report: Report, split: str, metrics: Metrics, halves: Metrics) -> None:
    sizes = {key: row for key, row in metrics.items() if image_size(key)}
    found = _found(list(sizes.values()))
    columns = ["size", "n", *(m.name for m in found)]
    columns.insert(3, f"noise floor: two halves of {halves['count'] * 2} real pictures")
    report.paragraph(f"Split {split}: {metrics['count']} captions.")
    rows = []
    for key, row in sizes.items():
        values = [row.get(m.key) for m in found]
        values.insert(1, halves.get(key))
        rows.append([key, row["count"], *values, *(rate(row.get(k), "whole") for k in KINDS)])
    report.table([*columns, "one object: right", "two objects: right"], rows)
    kinds = [
        [key, kind, row[kind]["count"], *(rate(row[kind], name) for name in RATES)]
        for key, row in sizes.items()
        for kind in (*KINDS, *PHRASINGS)
        if kind in row
    ]
    if kinds:
        report.table(["size", "caption", "n", *RATES], kinds)


def _guidance(report: Report, sweep: list[Metrics]) -> None:
    key = list(filter(image_size, sweep[0]))[-1]
    if sweep[0][key][FRECHET.key] is not None:
        curve = [(row[key][CLIP_SCORE.key], row[key][FRECHET.key], row["scale"]) for row in sweep]
        points = [(x, y, f"{scale:g}") for x, y, scale in curve]
        words = f"{key}, {sweep[0]['count']} captions; labels are guidance scales"
        report.curve(points, CLIP_SCORE.name, FRECHET.name, words)
    sizes = [(row["scale"], k, m) for row in sweep for k, m in row.items() if image_size(k)]
    found = _found([m for _, _, m in sizes])
    rows = [
        [scale, name, m["count"], *(m.get(measure.key) for measure in found)]
        + [rate(m.get(kind), "whole") for kind in KINDS]
        for scale, name, m in sizes
    ]
    names = [measure.name for measure in found]
    report.table(["scale", "size", "n", *names, "one object", "two objects"], rows)


def _attribution(report: Report, table: Metrics) -> None:
    report.paragraph(
        f"{sentence(table)} In each row the named stages are given their true output, and the "
        "cascade generates the rest; the difference to the row above is the cost of the last of "
        f"these stages. {table['count']} captions, the same noise in all rows."
    )
    for size in reversed(table["sizes"]):
        first = table["rows"][0][size]
        found = [m for m in measures.measures(measures.ATTRIBUTION) if first.get(m.key) is not None]
        columns = [f"{size}, given the true", "n", "replaces"]
        columns += [name for m in found for name in (m.name, "cost")]
        rows = []
        for row in table["rows"]:
            rows.append([", ".join(row["given"]), row[size]["count"], row.get("stage")])
            for key in (m.key for m in found):
                cost = row.get("cost", {}).get(size, {}).get(key)
                value = rate(row[size][key], "whole") if key in KINDS else row[size][key]
                rows[-1] += [value, cost and within(cost["cost"], cost["interval"])]
        report.table(columns, rows)


def _stages(report: Report, metrics: Metrics) -> None:
    if "reconstruction" in metrics:
        report.paragraph("True pictures, encoded and decoded by the autoencoder of a latent stage.")
        found = metrics["reconstruction"].items()
        rows = [
            [key, row["count"], within(row["psnr"], row["interval"])]
            + [rate(row.get(kind), "whole") for kind in KINDS]
            for key, row in found
        ]
        report.table(["size", "n", "PSNR, dB", "one object", "two objects"], rows)
    if "superresolution" in metrics:
        row = metrics["superresolution"]
        flat = {k: v for k, v in row.items() if not isinstance(v, dict)}
        report.paragraph("Super-resolution of the smallest true pictures, compared to bicubic.")
        report.table(list(flat), [list(flat.values())])
    rows = [
        [name.removeprefix("no_text_"), key, m["one"]["count"]]
        + [rate(m["one"], part) for part in ("whole", "binding")]
        for name in ("no_text_prior", "no_text_truth")
        for key, m in metrics.get(name, {}).items()
        if "one" in m
    ]
    if rows:
        report.paragraph(
            "The decoder with an image embedding and without the caption; captions of one object."
        )
        report.table(["embedding of", "size", "n", "whole", "binding"], rows)


def _over_time(report: Report, folder: Path) -> None:
    from PIL import Image

    for path in sorted(folder.glob("0*.png"))[-1:]:
        picture = Image.open(path, formats=["PNG"])
        report.picture(picture, f"samples after {int(path.stem):,} images")
