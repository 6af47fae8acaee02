"""Measures of a prior: its image embeddings compared to the true ones (unCLIP, section 5.1).

Each number is also computed with the text embedding in place of the prior's, and all numbers are
computed twice: with the averaged weights, which the cascade samples with, and with the weights of
the last step ("online"). Embeddings are rows of unit norm. Retrieving the row of an equal caption
counts as correct.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cascade.batch import Batch
from cascade.data.scenes.captions import ONE
from cascade.data.scenes.drawing import COLORS, SHAPES
from cascade.diffusion.distillation import Distilled
from cascade.diffusion.gaussian import Process
from cascade.diffusion.noise import alpha_sigma
from cascade.draws import Draws
from cascade.eval.cascades.protocol import HeldOut, Metrics, Paint, encoded
from cascade.eval.metrics.distances import frechet_rows
from cascade.eval.metrics.interval import of_share
from cascade.pipeline import Cascade, Link
from cascade.stage import Stage
from cascade.training.checkpoint import STATE, Checkpoint

KEY = "clip_image"
GALLERY = 256  # rows among which an embedding has to retrieve its own
PLACES = (1, 5, 10)  # k of retrieval at k
DRAWS, DRAWN = 4, 64  # samples of each caption, and captions, of the spread
LEVELS = [u / 10 for u in range(1, 10)]  # noise levels, as u of the schedule


@dataclass(frozen=True)
class Classes:
    """Classes for zero-shot classification, and the labels of samples.

    Attributes:
        captions: of each class.
        rows: the samples that have a label.
        labels: the index of each one's class.
        parts: attributes of each class, by name, on which accuracy is reported separately.
    """

    captions: Sequence[str]
    rows: Sequence[int]
    labels: Sequence[int]
    parts: Mapping[str, Sequence[str]]


def scene_classes(data: HeldOut) -> Classes | None:
    """Colour and shape of the object, for captions of one object; None if there are none."""
    rows = data.kind("one")
    if not rows:
        return None
    shapes = [s for s in SHAPES if any(o.shape == s for x in data.scenes or () for o in x.objects)]
    pairs = [(color, shape) for color in COLORS for shape in shapes]
    objects = [data.scenes[i].objects[0] for i in rows]
    return Classes(
        [ONE[0].format(size="", color=color, shape=shape) for color, shape in pairs],
        rows,
        [pairs.index((o.color, o.shape)) for o in objects],
        {"color": [color for color, _ in pairs], "shape": [shape for _, shape in pairs]},
    )


def measure_prior(
    cascade: Cascade, data: HeldOut, drawn: Tensor, paint: Paint, checkpoint: Checkpoint | None
) -> Metrics:
    """`prior_metrics` of a cascade's prior and, as `online`, with the weights of its last step.

    Args:
        drawn: the prior's embeddings of the captions, sampled with the averaged weights.
        checkpoint: the newest of the prior's run; None leaves `online` out.
    """
    prior = next(stage for stage in cascade.stages if stage.writes == KEY)
    out = prior_metrics(prior, data, drawn, paint)
    if checkpoint:
        with online(prior, checkpoint):
            drawn = paint(Cascade([prior]), data.captions, {}, "prior, online weights")[KEY]
            out["online"] = {"step": checkpoint.step, **prior_metrics(prior, data, drawn, paint)}
    return out


@contextmanager
def online(link: Link, checkpoint: Checkpoint) -> Iterator[None]:
    """A context in which a stage has a checkpoint's weights instead of their average."""
    stage = _stage(link)
    averaged = {key: value.clone() for key, value in stage.state_dict().items()}
    state = torch.load(checkpoint.path / STATE, map_location="cpu", weights_only=True)
    try:
        stage.load_state_dict(state["state_dict"])
        yield
    finally:
        stage.load_state_dict(averaged)


def _stage(link: Link) -> Stage:
    while not isinstance(link, Stage):
        link = link.stage
    return link


def prior_metrics(prior: Link, data: HeldOut, drawn: Float[Tensor, "n d"], paint: Paint) -> Metrics:
    """Compares a prior's embeddings `drawn` of held-out captions to the true ones.

    Numbers with the suffix "_text" use the text embeddings in place of the prior's; ratios divide
    the prior's number by that one. Retrieval is among the first 256 rows. Rates have 95 %
    `intervals`.
    """
    true, same = data.truth[KEY], groups(data.captions)

    def encode(captions: Sequence[str]) -> Batch:
        return prior.encoded({"caption": captions})

    text, found = encoded(encode, data.captions), scene_classes(data)
    out: Metrics = {"count": len(data), "gallery": min(GALLERY, len(data)), "intervals": {}}
    for suffix, rows in (("", drawn), ("_text", text)):
        out[f"cosine{suffix}"] = F.cosine_similarity(rows, true).mean().item()
        out[f"cosine_unrelated{suffix}"] = unrelated(rows, true, same)
        out[f"frechet{suffix}"] = frechet_rows(rows, true)
        for k in PLACES:
            name = f"retrieval{suffix}" if k == 1 else f"retrieval_{k}{suffix}"
            out[name] = retrieval(rows[:GALLERY], true[:GALLERY], same[:GALLERY], k)
            out["intervals"][name] = of_share(out[name], out["gallery"])
    if out["frechet"] is not None:
        out["frechet_ratio"] = out["frechet"] / out["frechet_text"]
    out["retrieval_ratio"] = out["retrieval"] / max(out["retrieval_text"], 1 / out["gallery"])
    if found:
        of_classes = encoded(encode, found.captions)
        for name, rows in (("", drawn), ("_text", text), ("_true", true)):
            out[f"zero_shot{name}"] = zero_shot(rows, of_classes, found)
    out["spread"] = spread(data, same, paint, prior)
    out["loss_by_level"] = loss_by_level(_stage(prior), data, text)
    return out


def groups(captions: Sequence[str]) -> Int64[Tensor, " n"]:
    """A number for each caption; equal captions have equal numbers."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])


def unrelated(
    rows: Float[Tensor, "n d"], true: Float[Tensor, "n d"], same: Int64[Tensor, " n"]
) -> float | None:
    """The mean cosine over all pairs of different captions; None if all captions are equal."""
    rows, true = (F.normalize(x.double(), dim=1) for x in (rows, true))
    sums = [x.new_zeros(int(same.max()) + 1, x.shape[1]) for x in (rows, true)]
    a, b = (total.index_add(0, same, x) for total, x in zip(sums, (rows, true)))
    pairs = len(rows) ** 2 - same.bincount().square().sum().item()
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / pairs).item() if pairs else None


def retrieval(
    queries: Float[Tensor, "n d"], gallery: Float[Tensor, "n d"], same: Int64[Tensor, " n"], k: int
) -> float:
    """Retrieval at k: share of queries with a row of their caption among the k nearest rows."""
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    nearest = cosines.topk(min(k, len(gallery)), dim=1).indices
    return (same[nearest] == same[:, None]).any(1).double().mean().item()


def zero_shot(
    rows: Float[Tensor, "n d"], of_classes: Float[Tensor, "c d"], classes: Classes
) -> Metrics:
    """Zero-shot accuracy by class and by each of its parts, with intervals."""
    cosines = F.normalize(rows[list(classes.rows)], dim=1) @ F.normalize(of_classes, dim=1).T
    nearest, n = cosines.argmax(1).tolist(), len(classes.rows)
    judged = {"class": range(len(classes.captions)), **classes.parts}
    rates = {
        part: sum(of[a] == of[b] for a, b in zip(nearest, classes.labels)) / n
        for part, of in judged.items()
    }
    intervals = {part: of_share(rate, n) for part, rate in rates.items()}
    return {**rates, "intervals": intervals, "classes": len(classes.captions), "count": n}


def spread(data: HeldOut, same: Int64[Tensor, " n"], paint: Paint, prior: Link) -> Metrics:
    """The mean distance between two samples of one caption, drawn from the prior and true ones.

    Captions that several true samples share are used; if there are none, `true` is None and any
    captions are.
    """
    rows = defaultdict(list)
    for i, number in enumerate(same.tolist()):
        rows[number].append(i)
    repeated = [r for r in rows.values() if len(r) > 1][:DRAWN]
    captions = [data.captions[r[0]] for r in repeated or list(rows.values())[:DRAWN]]
    drawn = paint(Cascade([prior]), captions * DRAWS, {}, "prior, several samples")[KEY]
    sets = drawn.unflatten(0, (DRAWS, -1)).transpose(0, 1)
    true = [apart(data.truth[KEY][r]) for r in repeated]
    return {
        "drawn": sum(map(apart, sets)) / len(captions),
        "true": sum(true) / len(true) if true else None,
        "samples": DRAWS,
        "count": len(captions),
    }


def apart(rows: Float[Tensor, "k d"]) -> float:
    """The mean distance over all pairs of rows."""
    return F.pdist(rows.double()).mean().item()


@torch.no_grad()
def loss_by_level(stage: Stage, data: HeldOut, text: Float[Tensor, "n d"]) -> Metrics | None:
    """The unweighted mean squared error of x0_hat at fixed noise levels, in the codec's units.

    All levels share the noise. `text` is the error of the text embedding as x0_hat. None for an
    autoregressive prior, which has no noise levels, and a distilled one, which knows few.
    """
    if not isinstance(stage.process, Process) or isinstance(stage.process, Distilled):
        return None
    u = torch.tensor(LEVELS, dtype=torch.float64, device=stage.device)
    logsnrs = stage.process.schedule(u)
    sums, text_sum = torch.zeros(len(u), dtype=torch.float64), 0.0
    for start in range(0, len(data), GALLERY):
        rows = range(start, min(start + GALLERY, len(data)))
        batch = _batch(stage, data, rows)
        x0, cond = stage.codec.encode(batch), stage.conditioner(batch)
        eps = Draws(0, f"{KEY}/level", batch["sample"], stage.device)(tuple(x0.shape))
        for i, logsnr in enumerate(logsnrs):
            alpha, sigma = alpha_sigma(logsnr)
            x0_hat = stage.process.denoise(stage.net, alpha * x0 + sigma * eps, logsnr, cond).x0
            sums[i] += (x0_hat - x0).square().flatten(1).mean(1).double().sum().cpu()
        guess = stage.codec.encode({**batch, KEY: text[list(rows)].to(x0.device)})
        text_sum += (guess - x0).square().flatten(1).mean(1).double().sum().item()
    losses = (sums / len(data)).tolist()
    return {
        "levels": [
            {"u": u, "logsnr": logsnr, "loss": loss}
            for u, logsnr, loss in zip(LEVELS, logsnrs.tolist(), losses)
        ],
        "text": text_sum / len(data),
        "count": len(data),
    }


def _batch(stage: Stage, data: HeldOut, rows: range) -> Batch:
    batch = {"caption": [data.captions[i] for i in rows], "sample": torch.tensor(rows)}
    batch[KEY] = data.truth[KEY][rows.start : rows.stop].to(stage.device)
    return stage.encoded(batch)
