"""The report of a cascade: targets, samples, curves and tables, from metrics and pictures.

Rates and costs are followed by their 95 % interval. `n` is the number of pictures or captions.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from cascade.batch import Batch, image_size
from cascade.data.tars.splits import described
from cascade.eval.cascades.attribution import sentence
from cascade.eval.cascades.protocol import KINDS, Metrics
from cascade.eval.metrics import measures
from cascade.eval.metrics.measures import CLIP_SCORE, FRECHET, Measure
from cascade.eval.pages.report import Report
from cascade.eval.scenes.geneval import TASKS
from cascade.grids import grid, to_uint8
from cascade.runs.run import METRICS, Run

RATES = ("whole", "objects", "binding", "counts", "relations")
OF_EMBEDDINGS = {
    "cosine": "cosine to the true embedding",
    "cosine_unrelated": "cosine to those of other captions",
    "frechet": "Fréchet distance to true embeddings",
    "retrieval": "retrieval at 1",
    "retrieval_5": "retrieval at 5",
    "retrieval_10": "retrieval at 10",
}


def write_report(path: Path, model: Path, metrics: Metrics, shown: dict[str, Batch]) -> None:
    """Writes the report to `path`.

    Args:
        model: directory of the cascade, for the loss curves of its stages.
        metrics: the content of metrics.json.
        shown: some generated pictures with their captions by split, the true ones as "truth", some
            at few "steps", and attacked ones as "typographic".
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
        _prior(report, metrics["prior"], described(next(iter(metrics["captions"]))))
    if "typographic" in metrics:
        report.heading("Typographic attack")
        _typographic(report, metrics["typographic"])
    if "bound" in metrics:
        report.heading("Variational bound")
        bits = metrics["bound"]["bits_per_dimension"]
        report.paragraph(f"For ancestral samplers of {metrics['bound']['steps']} steps.")
        report.table(["stage", "bits per dimension"], [list(row) for row in bits.items()])
    if "geneval" in metrics:
        report.heading("GenEval on scenes")
        _geneval(report, metrics["geneval"])
    if "edits" in metrics:
        report.heading("Edits of pictures")
        _edits(report, metrics["edits"])
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


def _rate(metrics: Metrics | None, name: str) -> str | None:
    """A rate with its interval; None if it was not measured."""
    if not metrics or name not in metrics:
        return None
    return _within(metrics[name], metrics["intervals"][name])


def _within(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


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
        rows.append([key, row["count"], *values, *(_rate(row.get(k), "whole") for k in KINDS)])
    report.table([*columns, "one object: right", "two objects: right"], rows)
    kinds = [
        [key, kind, row[kind]["count"], *(_rate(row[kind], rate) for rate in RATES)]
        for key, row in sizes.items()
        for kind in KINDS
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
        + [_rate(m.get(kind), "whole") for kind in KINDS]
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
                value = _rate(row[size][key], "whole") if key in KINDS else row[size][key]
                rows[-1] += [value, cost and _within(cost["cost"], cost["interval"])]
        report.table(columns, rows)


def _stages(report: Report, metrics: Metrics) -> None:
    if "superresolution" in metrics:
        row = metrics["superresolution"]
        flat = {k: v for k, v in row.items() if not isinstance(v, dict)}
        report.paragraph("Super-resolution of the smallest true pictures, compared to bicubic.")
        report.table(list(flat), [list(flat.values())])
    rows = [
        [name.removeprefix("no_text_"), key, m["one"]["count"]]
        + [_rate(m["one"], rate) for rate in ("whole", "binding")]
        for name in ("no_text_prior", "no_text_truth")
        for key, m in metrics.get(name, {}).items()
        if "one" in m
    ]
    if rows:
        report.paragraph(
            "The decoder with an image embedding and without the caption; captions of one object."
        )
        report.table(["embedding of", "size", "n", "whole", "binding"], rows)


def _prior(report: Report, prior: Metrics, whose: str) -> None:
    report.paragraph(
        f"The prior's image embeddings of {whose}, compared to the true ones: with the averaged "
        "weights, with those of the last step (online), and with the text embeddings in their "
        f"place. Retrieval is among {prior['gallery']}; equal captions count as correct."
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


def _number(metrics: Metrics | None, name: str) -> str | float | None:
    if not metrics:
        return None
    return _rate(metrics, name) if name in metrics["intervals"] else metrics[name]


def _levels(report: Report, prior: Metrics) -> None:
    both = [of and of["loss_by_level"] for of in (prior, prior.get("online"))]
    if both[0] is None:
        report.paragraph("No loss by noise level: this prior is autoregressive.")
        return
    report.paragraph("Mean squared error of x0_hat by noise level, in the codec's units.")
    averaged, online = (of and [level["loss"] for level in of["levels"]] for of in both)
    rows = [
        [level["u"], level["logsnr"], both[0]["count"], averaged[i], online and online[i]]
        for i, level in enumerate(both[0]["levels"])
    ]
    report.table(["u", "logsnr", "n", "averaged", "online"], rows)
    report.paragraph(f"With the text embedding as x0_hat: {both[0]['text']:.4g} at each level.")


def _geneval(report: Report, scores: Metrics) -> None:
    report.paragraph(
        f"GenEval's tasks on {scores['level']} scenes, scored by the scene recognizer: shares of "
        "correct pictures, and the mean over the tasks. Only the prompts of the task of colours "
        "are worded as in training; the others omit colours or relations."
    )
    rows = {TASKS[task]: row for task, row in scores["tasks"].items()}
    report.table(
        ["task", "right", "prompts", "n"],
        [
            [name, _within(row["score"], row["interval"]), row["prompts"], row["count"]]
            for name, row in {**rows, "overall": scores["overall"]}.items()
        ],
    )


def _typographic(report: Report, found: Metrics) -> None:
    report.paragraph(
        f"{found['count']} pictures of one object, in which nothing, the name of its "
        "shape, or that of another shape is written. The cascade's CLIP classifies them by colour "
        "and shape. Of the pictures with a wrong word it takes "
        f"{_within(found['fooled'], found['intervals']['fooled'])} for the shape that is named."
    )
    rows = [
        [kind, shot["count"], *(_rate(shot, part) for part in ("class", "color", "shape"))]
        for kind, shot in found["zero_shot"].items()
    ]
    report.table(["written", "n", "class right", "colour right", "shape right"], rows)
    names = ("true", "shape", "word", "unclear")
    rows = [
        [kind, found["count"], *(_rate(of, name) for name in names)]
        for kind, of in found["variations"].items()
    ]
    columns = ["true colour and shape", "true shape", "the shape that the wrong word names"]
    report.paragraph("What variations of the pictures show, read by the recognizer.")
    report.table(["variations of", "n", *columns, "not one object"], rows)


def _edits(report: Report, edits: Metrics) -> None:
    report.paragraph(
        f"Edits of pictures of held-out scenes, as the scene recognizer sees them at "
        f"{edits['side']} px; the first of the split, without selection."
    )
    columns = itemgetter("what", "asked", "measured", "reached")
    report.targets(list(map(columns, edits["targets"])))
    rows = [
        [name, row["share"], row["count"], _within(row["rate"], row["interval"])]
        for name in ("color", "shape")
        for row in edits.get(name, {}).get("by_share", [])
    ]
    if rows:
        report.table(["text difference of", "share of the rotation", "n", "right"], rows)


def _over_time(report: Report, folder: Path) -> None:
    from PIL import Image

    for path in sorted(folder.glob("0*.png"))[-1:]:
        picture = Image.open(path, formats=["PNG"])
        report.picture(picture, f"samples after {int(path.stem):,} images")
