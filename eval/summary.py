"""The report of a whole cascade: targets, samples, curves and tables, from metrics and pictures."""

from pathlib import Path

from cascade.conditioning import Batch
from cascade.eval.protocol import Metrics
from cascade.eval.report import Report
from cascade.grids import grid, to_uint8

RATES = ("whole", "objects", "binding", "counts", "relations")


def write_report(path: Path, model: Path, metrics: Metrics, shown: dict[str, Batch]) -> None:
    """Writes `path`.

    Args:
        model: directory of the cascade, whose stages' loss curves are drawn.
        metrics: as `cascade evaluate` stores them.
        shown: some painted pictures and their captions by split, and "truth".
    """
    report = Report("Cascade: from captions to pictures")
    space = metrics["features"]
    report.paragraph(
        f"All pictures are of held-out captions, one each, none chosen, seed {metrics['seed']}. "
        f"Distances are Fréchet distances in this space: {space}. They are not FID, "
        "which is defined by other features, and compare only with each other."
    )
    if "targets" in metrics:
        report.heading("What was asked for")
        report.targets(
            [
                (row["what"], row["asked"], row["measured"], row["reached"])
                for row in metrics["targets"]
            ]
        )
    for split, batch in shown.items():
        title = (
            "The true pictures of the same captions" if split == "truth" else f"Painted: {split}"
        )
        report.heading(title)
        _pictures(report, batch)
    report.heading("Measures by size")
    for split in metrics["captions"]:
        _by_size(report, split, metrics[split], metrics["real_halves"])
    report.heading("Guidance")
    _guidance(report, metrics["guidance"])
    report.heading("Each stage alone")
    _stages(report, metrics)
    report.heading("Training")
    for run in sorted(model.glob("*/metrics.csv")):
        report.losses(run, run.parent.name)
        _over_time(report, run.parent / "samples")
    report.save(path)


def _pictures(report: Report, batch: Batch) -> None:
    keys = [k for k in batch if k.startswith("image_")]
    largest = max(keys, key=lambda key: batch[key].shape[-1])
    pictures = to_uint8(batch[largest])
    side = pictures.shape[1]
    shown = pictures[:, :: max(1, side // 128), :: max(1, side // 128)]
    sheet = grid(shown, columns=6, captions=batch["caption"], scale=max(1, 128 // side))
    report.picture(sheet, f"{largest}, shown at {shown.shape[1] * max(1, 128 // side)} px")


def _by_size(report: Report, split: str, measures: Metrics, halves: Metrics) -> None:
    rows = []
    for key, row in measures.items():
        if not key.startswith("image_"):
            continue
        rates = [row.get(kind, {}).get("whole") for kind in ("one", "two")]
        real = halves.get(key)
        rows.append([key, row["frechet"], real, row.get("clip_score"), *rates])
    columns = ["size", "Fréchet distance", f"two halves of {halves['count'] * 2} real ones"]
    report.paragraph(f"Split {split}: {measures['count']} captions.")
    report.table([*columns, "CLIP score", "one object: right", "two objects: right"], rows)
    kinds = [
        [key, kind, *(row[kind].get(rate) for rate in RATES)]
        for key, row in measures.items()
        if key.startswith("image_")
        for kind in ("one", "two")
        if kind in row
    ]
    if kinds:
        report.table(["size", "caption", *RATES], kinds)


def _guidance(report: Report, sweep: list[Metrics]) -> None:
    key = [k for k in sweep[0] if k.startswith("image_")][-1]
    report.curve(
        [row[key]["clip_score"] for row in sweep],
        [row[key]["frechet"] for row in sweep],
        [f"{row['scale']:g}" for row in sweep],
        "CLIP score",
        "Fréchet distance",
        f"{key}, {sweep[0]['count']} captions; the guidance scale beside each point",
    )
    rows = [
        [row["scale"], name, m["frechet"], m.get("clip_score")]
        + [m.get(kind, {}).get("whole") for kind in ("one", "two")]
        for row in sweep
        for name, m in row.items()
        if name.startswith("image_")
    ]
    columns = ["scale", "size", "Fréchet distance", "CLIP score", "one object", "two objects"]
    report.table(columns, rows)


def _stages(report: Report, metrics: Metrics) -> None:
    for name in ("prior", "superresolution"):
        if name in metrics:
            flat = {k: v for k, v in metrics[name].items() if not isinstance(v, dict)}
            report.paragraph(name)
            report.table(list(flat), [list(flat.values())])
    rows = [
        [name.removeprefix("no_text_"), key, m["one"]["whole"], m["one"]["binding"]]
        for name in ("no_text_prior", "no_text_truth")
        for key, m in metrics.get(name, {}).items()
        if "one" in m
    ]
    if rows:
        report.paragraph("The decoder told an image embedding and no text; one-object captions.")
        report.table(["embedding of", "size", "whole", "binding"], rows)


def _over_time(report: Report, folder: Path) -> None:
    from PIL import Image

    for path in sorted(folder.glob("0*.png"))[-1:]:
        picture = Image.open(path, formats=["PNG"])
        report.picture(picture, f"samples after {int(path.stem):,} images")
