"""The report of a whole cascade: targets, samples, curves and tables, from metrics and pictures.

Behind a rate or a cost stands its interval of 95 %, and `n` is how many pictures or captions a row
is of.
"""

from pathlib import Path

from cascade.conditioning import Batch
from cascade.data.splits import described
from cascade.eval.attribution import MEASURES, sentence
from cascade.eval.geneval import TASKS
from cascade.eval.protocol import KINDS, Metrics
from cascade.eval.report import Report
from cascade.grids import grid, to_uint8

RATES = ("whole", "objects", "binding", "counts", "relations")
# Of an embedding, and which of them are shares of right answers.
OF_EMBEDDINGS = {
    "cosine": "cosine to the true embedding",
    "cosine_unrelated": "cosine to those of other captions",
    "frechet": "Fréchet distance to true embeddings",
    "retrieval": "retrieval at 1",
    "retrieval_5": "retrieval at 5",
    "retrieval_10": "retrieval at 10",
}


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
        f"All pictures are of {_whose(metrics)}, one each, none chosen, seed {metrics['seed']}. "
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
    report.heading("Which stage costs how much")
    _attribution(report, metrics["attribution"])
    _stages(report, metrics)
    if "prior" in metrics:
        report.heading("The prior")
        _prior(report, metrics["prior"], described(next(iter(metrics["captions"]))))
    if "geneval" in metrics:
        report.heading("GenEval on scenes")
        _geneval(report, metrics["geneval"])
    report.heading("Training")
    for run in sorted(model.glob("*/metrics.csv")):
        report.losses(run, run.parent.name)
        _over_time(report, run.parent / "samples")
    report.save(path)


def _whose(metrics: Metrics) -> str:
    """ "held-out captions", or whatever they are."""
    return "; ".join(dict.fromkeys(described(split) for split in metrics["captions"]))


def _pictures(report: Report, batch: Batch) -> None:
    keys = [k for k in batch if k.startswith("image_")]
    largest = max(keys, key=lambda key: batch[key].shape[-1])
    pictures = to_uint8(batch[largest])
    side = pictures.shape[1]
    shown = pictures[:, :: max(1, side // 128), :: max(1, side // 128)]
    sheet = grid(shown, columns=6, captions=batch["caption"], scale=max(1, 128 // side))
    report.picture(sheet, f"{largest}, shown at {shown.shape[1] * max(1, 128 // side)} px")


def _rate(measures: Metrics | None, name: str) -> str | None:
    """A rate with its interval; None where it is not measured."""
    if not measures or name not in measures:
        return None
    return _within(measures[name], measures["intervals"][name])


def _within(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def _by_size(report: Report, split: str, measures: Metrics, halves: Metrics) -> None:
    sizes = {key: row for key, row in measures.items() if key.startswith("image_")}
    columns = ["size", "n", "Fréchet distance", f"two halves of {halves['count'] * 2} real ones"]
    report.paragraph(f"Split {split}: {measures['count']} captions.")
    report.table(
        [*columns, "CLIP score", "one object: right", "two objects: right"],
        [
            [key, row["count"], row["frechet"], halves.get(key), row.get("clip_score")]
            + [_rate(row.get(kind), "whole") for kind in KINDS]
            for key, row in sizes.items()
        ],
    )
    kinds = [
        [key, kind, row[kind]["count"], *(_rate(row[kind], rate) for rate in RATES)]
        for key, row in sizes.items()
        for kind in KINDS
        if kind in row
    ]
    if kinds:
        report.table(["size", "caption", "n", *RATES], kinds)


def _guidance(report: Report, sweep: list[Metrics]) -> None:
    key = [k for k in sweep[0] if k.startswith("image_")][-1]
    if sweep[0][key]["frechet"] is not None:  # enough pictures for one
        report.curve(
            [row[key]["clip_score"] for row in sweep],
            [row[key]["frechet"] for row in sweep],
            [f"{row['scale']:g}" for row in sweep],
            "CLIP score",
            "Fréchet distance",
            f"{key}, {sweep[0]['count']} captions; the guidance scale beside each point",
        )
    rows = [
        [row["scale"], name, m["count"], m["frechet"], m.get("clip_score")]
        + [_rate(m.get(kind), "whole") for kind in KINDS]
        for row in sweep
        for name, m in row.items()
        if name.startswith("image_")
    ]
    columns = ["scale", "size", "n", "Fréchet distance", "CLIP score", "one object", "two objects"]
    report.table(columns, rows)


def _attribution(report: Report, table: Metrics) -> None:
    report.paragraph(
        f"{sentence(table)} Each row of the table is given what the stages named in it should "
        "have written, and the others paint; the difference from the row above is what the last "
        f"of these stages costs. {table['count']} captions, the same noise in all rows."
    )
    for size in reversed(table["sizes"]):
        found = [m for m in MEASURES if table["rows"][0][size].get(m) is not None]
        columns = [f"{size}, given the true", "n", "replaces"]
        columns += [name for m in found for name in (MEASURES[m], "cost")]
        report.table(columns, [_attributed(row, size, found) for row in table["rows"]])


def _attributed(row: Metrics, size: str, found: list[str]) -> list[str | int | float | None]:
    cells = [", ".join(row["given"]), row[size]["count"], row.get("stage")]
    for measure in found:
        cost = row.get("cost", {}).get(size, {}).get(measure)
        rate = measure in KINDS
        cells.append(_rate(row[size][measure], "whole") if rate else row[size][measure])
        cells.append(cost and _within(cost["cost"], cost["interval"]))
    return cells


def _stages(report: Report, metrics: Metrics) -> None:
    if "superresolution" in metrics:
        row = metrics["superresolution"]
        flat = {k: v for k, v in row.items() if not isinstance(v, dict)}
        report.paragraph("Super-resolution of the smallest true pictures, beside bicubic.")
        report.table(list(flat), [list(flat.values())])
    rows = [
        [name.removeprefix("no_text_"), key, m["one"]["count"]]
        + [_rate(m["one"], rate) for rate in ("whole", "binding")]
        for name in ("no_text_prior", "no_text_truth")
        for key, m in metrics.get(name, {}).items()
        if "one" in m
    ]
    if rows:
        report.paragraph("The decoder told an image embedding and no text; one-object captions.")
        report.table(["embedding of", "size", "n", "whole", "binding"], rows)


def _prior(report: Report, prior: Metrics, whose: str) -> None:
    report.paragraph(
        f"Image embeddings that the prior makes of {whose}, against the true ones: with "
        "the averaged weights, with those of the last step (online), and the text embeddings in "
        f"their place. Retrieval is among {prior['gallery']}; equal captions count as right."
    )
    columns = {"averaged": (prior, ""), "online": (prior.get("online"), "")}
    columns["text embedding"] = prior, "_text"
    rows = [
        [what, prior["gallery"] if name.startswith("retrieval") else prior["count"]]
        + [_number(of, name + suffix) for of, suffix in columns.values()]
        + [None]
        for name, what in OF_EMBEDDINGS.items()
    ]
    columns["true embedding"] = prior, "_true"
    for part in ("class", "color", "shape"):
        shots = [(of or {}).get(f"zero_shot{suffix}") for of, suffix in columns.values()]
        if shots[0] and part in shots[0]:
            what = f"zero-shot {part} of {shots[0]['classes']} classes"
            rows.append([what, shots[0]["count"], *(_rate(shot, part) for shot in shots)])
    apart = [of and of["spread"]["drawn"] for of, _ in list(columns.values())[:2]]
    spread = prior["spread"]
    what = f"distance between {spread['samples']} samples of a caption"
    rows.append([what, spread["count"], *apart, None, spread["true"]])
    report.table(["", "n", *columns], rows)
    _levels(report, prior)


def _number(measures: Metrics | None, name: str) -> str | float | None:
    if not measures:
        return None
    return _rate(measures, name) if name in measures["intervals"] else measures[name]


def _levels(report: Report, prior: Metrics) -> None:
    both = [of and of["loss_by_level"] for of in (prior, prior.get("online"))]
    if both[0] is None:
        report.paragraph("No loss by level of noise: this prior is autoregressive.")
        return
    report.paragraph("Mean square of x0_hat - x0 by level of noise, in the codec's units.")
    averaged, online = (of and [level["loss"] for level in of["levels"]] for of in both)
    rows = [
        [level["u"], level["logsnr"], both[0]["count"], averaged[i], online and online[i]]
        for i, level in enumerate(both[0]["levels"])
    ]
    report.table(["u", "logsnr", "n", "averaged", "online"], rows)
    report.paragraph(f"The text embedding in x0_hat's place: {both[0]['text']:.4g} at each level.")


def _geneval(report: Report, scores: Metrics) -> None:
    report.paragraph(
        f"GenEval's tasks on {scores['level']} scenes, scored by the scene reader: shares of right "
        "pictures, and the mean over the tasks. Only the captions of the task of colours are "
        "worded as in training; the others name shapes without colour, or without a relation."
    )
    rows = {TASKS[task]: row for task, row in scores["tasks"].items()}
    report.table(
        ["task", "right", "prompts", "n"],
        [
            [name, _within(row["score"], row["interval"]), row["prompts"], row["count"]]
            for name, row in {**rows, "overall": scores["overall"]}.items()
        ],
    )


def _over_time(report: Report, folder: Path) -> None:
    from PIL import Image

    for path in sorted(folder.glob("0*.png"))[-1:]:
        picture = Image.open(path, formats=["PNG"])
        report.picture(picture, f"samples after {int(path.stem):,} images")
