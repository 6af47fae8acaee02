"""Sections of a cascade's report: the prior, and what options of `evaluate` ask for."""

from operator import itemgetter

from cascade.eval.cascades.protocol import Metrics, rate, within
from cascade.eval.cascades.styles import GALLERY
from cascade.eval.pages.report import Report
from cascade.eval.scenes.geneval import TASKS

OF_EMBEDDINGS = {
    "cosine": "cosine to the true embedding",
    "cosine_unrelated": "cosine to those of other captions",
    "frechet": "Fréchet distance to true embeddings",
    "retrieval": "retrieval at 1",
    "retrieval_5": "retrieval at 5",
    "retrieval_10": "retrieval at 10",
}
_target = itemgetter("what", "asked", "measured", "reached")


def geneval(report: Report, scores: Metrics) -> None:
    report.paragraph(
        f"GenEval's tasks on {scores['level']} scenes, scored by the scene recognizer: shares of "
        "correct pictures, and the mean over the tasks. Only the prompts of the task of colours "
        "are worded as in training; the others omit colours or relations."
    )
    rows = {TASKS[task]: row for task, row in scores["tasks"].items()}
    report.table(
        ["task", "right", "prompts", "n"],
        [
            [name, within(row["score"], row["interval"]), row["prompts"], row["count"]]
            for name, row in {**rows, "overall": scores["overall"]}.items()
        ],
    )


def typographic(report: Report, found: Metrics) -> None:
    report.paragraph(
        f"{found['count']} pictures of one object, in which nothing, the name of its "
        "shape, or that of another shape is written. The cascade's CLIP classifies them by colour "
        "and shape. Of the pictures with a wrong word it takes "
        f"{within(found['fooled'], found['intervals']['fooled'])} for the shape that is named."
    )
    rows = [
        [kind, shot["count"], *(rate(shot, part) for part in ("class", "color", "shape"))]
        for kind, shot in found["zero_shot"].items()
    ]
    report.table(["written", "n", "class right", "colour right", "shape right"], rows)
    names = ("true", "shape", "word", "unclear")
    rows = [
        [kind, found["count"], *(rate(of, name) for name in names)]
        for kind, of in found["variations"].items()
    ]
    columns = ["true colour and shape", "true shape", "the shape that the wrong word names"]
    report.paragraph("What variations of the pictures show, read by the recognizer.")
    report.table(["variations of", "n", *columns, "not one object"], rows)


def edits(report: Report, found: Metrics) -> None:
    if "style" in found:
        return _styles(report, found)
    report.paragraph(
        f"Edits of pictures of held-out scenes, as the scene recognizer sees them at "
        f"{found['side']} px; the first of the split, without selection."
    )
    report.targets(list(map(_target, found["targets"])))
    rows = [
        [name, row["share"], row["count"], within(row["rate"], row["interval"])]
        for name in ("color", "shape")
        for row in found.get(name, {}).get("by_share", [])
    ]
    if rows:
        report.table(["text difference of", "share of the rotation", "n", "right"], rows)


def control(report: Report, found: Metrics) -> None:
    report.paragraph(
        f"{found['count']} held-out scenes, painted with and without each condition of their true "
        "pictures: agreement of the painted condition with the asked one, and scene accuracy "
        f"(without: {within(*found['uncontrolled']['accuracy'].values())})."
    )
    report.targets(list(map(_target, found["targets"])))
    rows = [
        [
            *(name, row["measure"], rate(row, "asked"), rate(row, "uncontrolled")),
            within(*row["accuracy"].values()),
        ]
        for name, row in found.items()
        if isinstance(row, dict) and "measure" in row
    ]
    report.table(["condition", "measure", "steered", "without", "scene accuracy"], rows)


def _styles(report: Report, found: Metrics) -> None:
    style = found["style"]
    report.paragraph(
        f"Text differences of the style of pictures, judged at {style['side']} px: how often the "
        "result is nearest to the true picture of its concept in the asked style, among "
        f"{style['gallery']} pictures of that style, and how often to the mean of that style. "
        "Without an edit, the picture that is edited is judged."
    )
    report.targets(list(map(_target, found["targets"])))
    judged = [("none", style["none"]), *((row["share"], row) for row in style["by_share"])]
    rows = [
        [share, row["count"], *(rate(row, name) for name in ("retrieval", "style", "both"))]
        for share, row in [*judged, ("the true picture", style["truth"])]
    ]
    report.table(["share of the rotation", "n", "retrieved", "in the asked style", "both"], rows)


def concepts(report: Report, by_split: Metrics) -> None:
    report.paragraph(
        "Pictures painted from captions of a concept in a style, as a judge that took no part sees "
        "them: how often the true picture is nearest among at most "
        f"{GALLERY} of that style, whether the style is right, and how often the true picture is "
        "nearest among those of the concept in all styles. Apart: pairs of concept and style that "
        "training has shown, pairs that it has not, and concepts that it has not."
    )
    names = ("retrieval", "style", "both", "among_styles")
    rows = [
        [split, kind, row["count"], *(rate(row, name) for name in names)]
        for split, found in by_split.items()
        for kind, row in [("all", found), *found["kinds"].items()]
    ]
    columns = ["retrieved", "in the asked style", "both", "nearest among its styles"]
    report.table(["split", "asked for", "n", *columns], rows)
    report.paragraph(
        "The nearest training picture: its cosine to the painted picture and to the true one, and "
        "how often it shows the asked concept or style."
    )
    rows = [
        [split, found["count"], near["cosine"], near.get("true_cosine")]
        + [rate(near, name) for name in ("concept", "style")]
        for split, found in by_split.items()
        for near in [found["nearest"]]
    ]
    columns = ["cosine, painted", "cosine, true", "asked concept", "asked style"]
    report.table(["split", "n", *columns], rows)


def of_prior(report: Report, prior: Metrics, whose: str) -> None:
    """Write what was measured of the prior's embeddings of some captions."""
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
            rows.append([what, shots[0]["count"], *(rate(shot, part) for shot in shots)])
    apart = [of and of["spread"]["drawn"] for of, _ in list(columns.values())[:2]]
    spread = prior["spread"]
    what = f"distance between {spread['samples']} samples of a caption"
    rows.append([what, spread["count"], *apart, None, spread["true"]])
    report.table(["", "n", *columns], rows)
    _levels(report, prior)


def _number(metrics: Metrics | None, name: str) -> str | float | None:
    if not metrics:
        return None
    return rate(metrics, name) if name in metrics["intervals"] else metrics[name]


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
