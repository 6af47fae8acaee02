"""What a prior is worth: its image embeddings beside the true ones (unCLIP, section 5.1).

Beside each number stands the same of the text embedding in the prior's place, and the whole is
measured twice: with the averaged weights, which sample, and with those of the last step, online.
Embeddings are rows of unit norm. Rows of equal captions are equally good answers to each other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cascade.conditioning import Batch
from cascade.data.captions import ONE
from cascade.data.drawing import COLORS, SHAPES
from cascade.diffusion.gaussian import Process
from cascade.diffusion.noise import alpha_sigma
from cascade.draws import Draws
from cascade.eval.interval import of_share
from cascade.eval.protocol import HeldOut, Metrics, Paint, encoded, frechet_rows
from cascade.pipeline import Cascade, Link
from cascade.stage import Stage
from cascade.training.checkpoint import STATE, Checkpoint

KEY = "clip_image"
GALLERY = 256  # rows among which a prior's embedding has to find its own
PLACES = (1, 5, 10)  # of retrieval
DRAWS, DRAWN = 4, 64  # samples of a caption, and captions, that tell the spread
LEVELS = [u / 10 for u in range(1, 10)]  # of noise, as u


@dataclass(frozen=True)
class Classes:
    """Classes for zero-shot classification, and to which of them samples belong.

    Attributes:
        captions: of the classes.
        rows: the samples that belong to a class.
        labels: their classes.
        parts: of each class, by name: what is judged by itself as well.
    """

    captions: Sequence[str]
    rows: Sequence[int]
    labels: Sequence[int]
    parts: Mapping[str, Sequence[str]]


def scene_classes(data: HeldOut) -> Classes | None:
    """Of captions of one object, its colour and shape; None where there are none."""
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
    """`prior_metrics` of the prior in a cascade and, as `online`, with its last step's weights.

    Args:
        drawn: its embeddings of the captions, with the averaged weights.
        checkpoint: the newest of its run; None leaves `online` out.
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
    """Within the context a stage computes with a checkpoint's weights instead of their average."""
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


def prior_metrics(
    prior: Link,
    data: HeldOut,
    drawn: Float[Tensor, "n d"],
    paint: Paint,
    classes: Callable[[HeldOut], Classes | None] = scene_classes,
) -> Metrics:
    """A prior's embeddings `drawn` of held-out captions against the true ones.

    With "_text" behind their names, numbers are of the text embeddings in the prior's place; the
    ratios are the prior's over these. Retrieval is among the first 256 rows, and shares of right
    answers have `intervals` of 95 %.
    """
    true, same = data.truth[KEY], groups(data.captions)

    def read(captions: Sequence[str]) -> Batch:
        return prior.completed({"caption": captions})

    text, found = encoded(read, data.captions), classes(data)
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
        of_classes = encoded(read, found.captions)
        for name, rows in (("", drawn), ("_text", text), ("_true", true)):
            out[f"zero_shot{name}"] = zero_shot(rows, of_classes, found)
    out["spread"] = spread(data, same, paint, prior)
    out["loss_by_level"] = loss_by_level(_stage(prior), data, text)
    return out


def groups(captions: Sequence[str]) -> Int64[Tensor, " n"]:
    """A number for each caption; equal ones have the same."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])


def unrelated(
    rows: Float[Tensor, "n d"], true: Float[Tensor, "n d"], same: Int64[Tensor, " n"]
) -> float | None:
    """The mean cosine over all pairs of different captions; None where all are equal."""
    rows, true = (F.normalize(x.double(), dim=1) for x in (rows, true))
    sums = [x.new_zeros(int(same.max()) + 1, x.shape[1]) for x in (rows, true)]
    a, b = (total.index_add(0, same, x) for total, x in zip(sums, (rows, true)))
    pairs = len(rows) ** 2 - same.bincount().square().sum().item()
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / pairs).item() if pairs else None


def retrieval(
    queries: Float[Tensor, "n d"], gallery: Float[Tensor, "n d"], same: Int64[Tensor, " n"], k: int
) -> float:
    """Share of queries with a row of their own caption among the k nearest by cosine."""
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    nearest = cosines.topk(min(k, len(gallery)), dim=1).indices
    return (same[nearest] == same[:, None]).any(1).double().mean().item()


def zero_shot(
    rows: Float[Tensor, "n d"], of_classes: Float[Tensor, "c d"], classes: Classes
) -> Metrics:
    """How often the nearest of the classes' text embeddings is that of a row's own class."""
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
    """How far samples of one caption lie apart: the mean distance of two, and of two true ones.

    `true` is of the captions that several samples have, and None where there are none; those
    are then the captions that are sampled.
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
    """The mean distance of two different rows."""
    return F.pdist(rows.double()).mean().item()


@torch.no_grad()
def loss_by_level(stage: Stage, data: HeldOut, text: Float[Tensor, "n d"]) -> Metrics | None:
    """The mean square of x0_hat - x0 at fixed levels of noise, in the codec's units; not weighted.

    All levels see the same noise. `text` is that of the text embedding in x0_hat's place. None
    where the process has no levels of noise (an autoregressive prior).
    """
    if not isinstance(stage.process, Process):
        return None
    u = torch.tensor(LEVELS, dtype=torch.float64, device=stage.device)
    logsnrs = stage.process.schedule(u)
    sums, told = torch.zeros(len(u), dtype=torch.float64), 0.0
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
        told += (guess - x0).square().flatten(1).mean(1).double().sum().item()
    losses = (sums / len(data)).tolist()
    return {
        "levels": [
            {"u": u, "logsnr": logsnr, "loss": loss}
            for u, logsnr, loss in zip(LEVELS, logsnrs.tolist(), losses)
        ],
        "text": told / len(data),
        "count": len(data),
    }


def _batch(stage: Stage, data: HeldOut, rows: range) -> Batch:
    batch = {"caption": [data.captions[i] for i in rows], "sample": torch.tensor(rows)}
    batch[KEY] = data.truth[KEY][rows.start : rows.stop].to(stage.device)
    return stage.completed(batch)
