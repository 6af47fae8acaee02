"""The section of a cascade's report that compares the prior's embeddings with the true ones."""

from cascade.eval.cascades.protocol import Metrics, rate
from cascade.eval.pages.report import Report

OF_EMBEDDINGS = {
    "cosine": "cosine to the true embedding",
    "cosine_unrelated": "cosine to those of other captions",
    "frechet": "Fréchet distance to true embeddings",
    "retrieval": "retrieval at 1",
    "retrieval_5": "retrieval at 5",
    "retrieval_10": "retrieval at 10",
}


def prior_section(report: Report, prior: Metrics, whose: str) -> None:
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
