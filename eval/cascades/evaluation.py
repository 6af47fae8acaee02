"""Measuring a cascade on held-out captions: every number of metrics.json, and the report."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cascade.batch import Batch, image_size
from cascade.config.checks import check_split
from cascade.data.embeddings import EMBEDDINGS
from cascade.data.tars.splits import described
from cascade.data.transforms import Condition
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.eval.cascades import attribution, held_out, likelihood, prior, summary, typographic
from cascade.eval.cascades.concepts import concepts_of
from cascade.eval.cascades.control import check as check_control
from cascade.eval.cascades.control import measure_control
from cascade.eval.cascades.edits import measure_edits
from cascade.eval.cascades.protocol import (
    KINDS,
    HeldOut,
    Looked,
    Metrics,
    against,
    distance,
    looking,
    picture_metrics,
)
from cascade.eval.cascades.reconstruction import reconstruction
from cascade.eval.cascades.styles import measure_styles, pairs_of
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.scenes.geneval import level_of, prompts, score_tasks, write_lines
from cascade.files.atomic import write_atomically
from cascade.grids import to_uint8
from cascade.pipeline import Cascade, Without
from cascade.runs.agreement import check_rows
from cascade.runs.cascade_file import CASCADE, stage_runs
from cascade.runs.choices import SamplingChoices
from cascade.runs.control import conditions_of
from cascade.runs.model import device, distilled, load_cascade, paint
from cascade.training.checkpoint import Checkpoint, newest_checkpoint

SHOWN = 24  # pictures of a sheet


@dataclass(frozen=True)
class Judged:
    """A cascade, and what measures it.

    Attributes:
        stages: the names of its stages.
        features: of the judging CLIP.
        checkpoint: the newest of the prior's run; None: there is no prior, or no checkpoint.
        data: folder of the shards.
        seed: of all noise.
        geneval: prompts for each of GenEval's tasks.
        bound: sampler steps of the variational bound (`likelihood`); 0: it is not measured.
        typographic: whether to attack its CLIP with written words (`typographic`).
        edits: pictures for each kind of edit.
        control: scenes to paint with each condition.
        conditions: that the stages read, by name.
    """

    cascade: Cascade
    stages: Sequence[str]
    features: CLIPFeatures
    checkpoint: Checkpoint | None
    data: Path
    seed: int
    geneval: int
    bound: int
    typographic: bool
    edits: int
    control: int
    conditions: Mapping[str, Condition]

    def paint(
        self, cascade: Cascade, captions: Sequence[str], given: Batch | None, what: str
    ) -> Batch:
        """Generates with this cascade's seed (see `protocol.Paint`)."""
        return paint(cascade, captions, self.seed, given=given, what=what)


def evaluate(
    model: Path,
    data: Path,
    judge: Path,
    counts: Mapping[str, int],
    guidance: Sequence[float],
    seed: int,
    targets: Mapping[str, Any] | None = None,
    choices: Sequence[str] = (),
    out: Path | None = None,
    geneval: int = 0,
    bound: int = 0,
    typographic: bool = False,
    edits: int = 0,
    control: int = 0,
) -> Path:
    """Measures a cascade; returns the folder of metrics.json and report.html.

    Args:
        model: folder of the cascade, or its cascade file.
        judge: folder of the judging CLIP.
        counts: captions of each kind (one object, two) by split. Guidance scales and single stages
            are measured on the first split only.
        guidance: scales of the first stage that generates pictures.
        targets: "at_least" or "at_most" by measure (a dotted path into the metrics).
        choices: sampling choices, as "stage.option=value".
        out: folder of the results (default: the cascade's).
        geneval: prompts for each of GenEval's tasks, of the level of the first split's scenes.
        bound: sampler steps of the variational bound (`likelihood`) on the first split; 0: none.
        typographic: whether to attack the cascade's CLIP on the first split (`typographic`).
        edits: pictures of the first split for each kind of edit (`measure_edits`; of data without
            scenes, `measure_styles`).
        control: scenes of the first split to paint with each condition of its ControlNets
            (`measure_control`).

    Raises:
        UserError: the data lack something that a measure needs.
    """
    begin = time.monotonic()
    file = model if model.suffix == ".yaml" else model / CASCADE
    out = out or file.parent
    for split in counts:
        check_split(data, split)
    cascade, runs = load_cascade(file, choices), stage_runs(file, choices)
    for split in counts:
        held_out.check_unseen(runs.values(), data, split)
    writers = dict(zip((stage.writes for stage in cascade.stages), runs.values()))
    checkpoint = newest_checkpoint(writers["clip_image"]) if "clip_image" in writers else None
    features = CLIPFeatures(FrozenCLIP(str(judge)).to(device()))
    conditions = conditions_of(file, choices) if control else {}
    asked = geneval, bound, typographic, edits, control, conditions
    of = Judged(cascade, list(runs), features, checkpoint, data, seed, *asked)
    metrics: Metrics = {"features": features.name, "captions": dict(counts), "seed": seed}
    metrics |= {"choices": list(choices)} if choices else {}
    metrics["captions_are"] = {split: described(split) for split in counts}
    shown: dict[str, Batch] = {}
    concepts: Metrics = {}
    for split, count in counts.items():
        # Each split in a call of its own, which frees its pictures before the next are decoded.
        found = _split(of, split, count, shown, guidance)
        concepts |= found.pop("concepts", {})
        metrics, guidance = metrics | found, None
    metrics |= {"concepts": concepts} if concepts else {}
    if geneval:
        metrics["geneval"] = _geneval(of, metrics.pop("level"), out)
    metrics["seconds"] = round(time.monotonic() - begin, 1)
    if targets:
        metrics["targets"] = against(targets, metrics)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(out / "metrics.json", lambda path: path.write_text(text))
    summary.write_report(out / "report.html", file.parent, metrics, shown)
    return out


def _split(
    of: Judged, split: str, count: int, shown: dict[str, Batch], guidance: Sequence[float] | None
) -> Metrics:
    """The measures of a split; of the first one, also those by stage and guidance scale.

    Args:
        shown: receives the pictures of the report.
        guidance: scales; None: the split is not the first.
    """
    samples = held_out.held_out_split(of.data, split, count, of.cascade)
    check(of.cascade, samples, of.geneval, of.data)
    if of.typographic and guidance is not None:
        typographic.check(of.cascade, samples)
    if of.control and guidance is not None:
        check_control(of.cascade, samples, of.conditions)
    if of.edits and not samples.scenes and guidance is not None:
        pairs_of(of.data, split, of.edits, of.seed)  # or refuse before anything is painted
    look = looking(replace(samples, truth={}), of.features)  # it outlives the largest pictures
    truth, sheet = look(samples.truth), _evenly(samples.truth, samples.captions)
    last = of.cascade.stages[-1].writes
    lost = {} if guidance is None else reconstruction(of.cascade, samples)
    if guidance is None or not (of.bound or of.control or of.edits or of.typographic):
        # The largest pictures were looked at, and no stage is given them.
        samples = replace(samples, truth={k: v for k, v in samples.truth.items() if k != last})
    painted = of.paint(of.cascade, samples.captions, None, split)
    shown[split], looks = _evenly(painted, samples.captions), look(painted)
    real = {key: one.rows for key, one in truth.items()}
    out: Metrics = {split: picture_metrics(looks, samples, real, of.features)}
    out[split]["count"] = len(samples)
    judge = samples.shown and concepts_of(of.data, split, of.features, image_size(last), of.seed)
    if judge:
        out["concepts"] = {split: judge.measured(looks[last].rows, samples.shown)}
    if guidance is not None:
        steps = _few_steps(of, samples, painted)
        drawn = {key: painted[key] for key in ("clip_image",) if key in painted}
        del painted  # looked at: from here on their features are enough
        out |= _by_stage(of, samples, drawn, looks, truth)
        out |= {"reconstruction": lost} if lost else {}
        out["real_halves"] = _halves(real, of.features)
        out["guidance"] = _guidance(of, samples, drawn, looks, real, guidance)
        if steps:
            shown["steps"] = steps
        shown["truth"] = sheet
        out |= {"level": level_of(samples.scenes)} if of.geneval else {}
        if of.typographic:
            found = typographic.typographic(of.cascade, samples, of.paint, of.seed)
            out["typographic"], shown["typographic"] = found
        if of.bound:
            bits = likelihood.bounds(of.cascade, samples.captions, samples.truth, of.seed, of.bound)
            out["bound"] = {"steps": of.bound, "bits_per_dimension": bits}
        if of.edits and samples.scenes:
            out["edits"] = measure_edits(of.cascade, samples, of.features, of.seed, of.edits)
        elif of.edits:
            asked = of.data, split, of.features, of.seed, of.edits
            out["edits"], shown["edits"] = measure_styles(of.cascade, *asked)
        if of.control:
            asked = of.conditions, samples, of.paint, of.control
            out["control"], shown["control"] = measure_control(of.cascade, *asked)
    return out


def check(cascade: Cascade, data: HeldOut, geneval: int, folder: Path) -> None:
    """Raises UserError if the data lack something that a measure of the cascade needs."""
    last = cascade.stages[-1].writes
    if "clip_image" in {s.writes for s in cascade.stages} and "clip_image" not in data.truth:
        raise UserError(f"{folder} has no embeddings: run `cascade data precompute` first")
    for link in cascade.stages:
        if link.writes == "clip_image":
            check_rows(link.unit, data.truth["clip_image"], folder / EMBEDDINGS)
    if geneval and not data.scenes:
        raise UserError(f"{folder} has no scenes: leave --geneval out, and use GenEval's scorer")
    if geneval and data.truth[last].shape[-1] < 64:
        raise UserError(f"--geneval needs pictures of at least 64 px, not {last}")


def _geneval(of: Judged, level: str, out: Path) -> Metrics:
    """The scores; also writes the prompts, and a result for each picture."""

    def pictures(captions: Sequence[str], task: str) -> Any:
        done = of.paint(of.cascade, captions, None, f"GenEval, {task}")
        return to_uint8(done[of.cascade.stages[-1].writes])

    asked = prompts(level, of.geneval, of.seed)
    scores, lines = score_tasks(asked, pictures)
    write_lines(out / "geneval_prompts.jsonl", asked)
    write_lines(out / "geneval_results.jsonl", lines)
    return {"level": level, **scores}


def _evenly(pictures: Batch, captions: Sequence[str]) -> Batch:
    """Evenly spaced pictures with their captions: captions of one kind come in one block."""
    rows = list(range(0, len(captions), max(1, len(captions) // SHOWN)))[:SHOWN]
    images = {key: value[rows] for key, value in pictures.items() if image_size(key)}
    return {**images, "caption": [captions[i] for i in rows]}


def _by_stage(
    of: Judged,
    data: HeldOut,
    drawn: Batch,
    looks: Mapping[str, Looked],
    truth: Mapping[str, Looked],
) -> Metrics:
    """The attribution, super-resolution alone, the prior alone, and the decoder without text.

    Args:
        drawn: the embeddings that the prior drew, if there is one.
        looks: the cascade's pictures.
        truth: the true ones.
    """
    cascade, features = of.cascade, of.features
    some = data.first(5 * features.dim)
    first = range(len(some))
    begun, true = ({k: one.where(first) for k, one in all.items()} for all in (looks, truth))
    table = attribution.attribution(cascade, of.stages, some, begun, true, features, of.paint)
    out: Metrics = {"attribution": table}
    if row := attribution.superresolution(cascade, some, true, table, features):
        out["superresolution"] = row
    if drawn:
        z = drawn["clip_image"]
        out["prior"] = prior.measure_prior(cascade, data, z, of.paint, of.checkpoint)
        rows = data.kind("one") or list(range(len(data)))
        small = cascade.upto("image_64")
        some = data.where(rows, ())
        real = {key: one.rows[rows] for key, one in truth.items()}
        small = small.replace(Without(small.painter, ("caption",)))  # its caption is withheld
        look = looking(some, features)
        for name, z in (("prior", drawn), ("truth", data.truth)):
            given = {"clip_image": z["clip_image"][rows]}
            done = look(of.paint(small, some.captions, given, f"no text, {name}"))
            out[f"no_text_{name}"] = picture_metrics(done, some, real, features)
    return out


def _halves(real: Batch, features: CLIPFeatures) -> Metrics:
    """The distance between two halves of the real pictures, by size: the noise floor."""
    out: Metrics = {}
    for key, rows in real.items():
        half = len(rows) // 2
        halves = rows[::2][:half], rows[1::2][:half]
        out[key] = distance(features, *halves, min(4 * features.dim, half))
        out["count"] = half
    return out


def _guidance(
    of: Judged,
    data: HeldOut,
    drawn: Batch,
    looks: Mapping[str, Looked],
    real: Batch,
    scales: Sequence[float],
) -> list[Metrics]:
    """The measures at each guidance scale of the first stage that generates pictures.

    All scales share captions and noise. `drawn`, `looks` and `real` are the embeddings and the
    pictures of the cascade as it is, and the features of the true pictures.
    """
    few = 4 * of.features.dim
    rows = list(range(0, len(data), max(1, len(data) // few)))[:few]
    some = data.where(rows, ())
    given, look = {key: z[rows] for key, z in drawn.items()}, looking(some, of.features)

    def at(scale: float) -> Metrics:  # returns before the next scale, so its pictures are freed
        if scale == of.cascade.painter.sampler.scale:
            found = {key: one.where(rows) for key, one in looks.items()}
        else:
            stage = SamplingChoices(scale=scale).applied(of.cascade.painter)
            altered = of.cascade.replace(stage)
            found = look(of.paint(altered, some.captions, given, f"guidance {scale:g}"))
        return picture_metrics(found, some, real, of.features)

    return [{"scale": scale, "count": len(some), **at(scale)} for scale in scales]


def _few_steps(of: Judged, data: HeldOut, painted: Batch) -> Batch:
    """A few captions at 1, 2, 4 and all steps of the first stage that generates pictures.

    Nothing if that stage has one step, or is distilled, and so knows one number of steps.
    """
    whole = of.cascade.painter.sampler.steps
    fewer = [steps for steps in (4, 2, 1) if steps < whole]
    if not fewer or of.cascade.painter.writes in distilled(of.cascade):
        return {}
    kinds = [data.kind(kind)[:2] for kind in KINDS] if data.scenes else [range(min(4, len(data)))]
    rows = [i for some in kinds for i in some]
    some, last = data.where(rows, ()), of.cascade.stages[-1].writes
    given = {k: painted[k][rows] for k in ("clip_image",) if k in painted}
    pictures, titles = [painted[last][rows]], [f"{whole} steps: {text}" for text in some.captions]
    for steps in fewer:
        try:
            stage = SamplingChoices(steps=steps).applied(of.cascade.painter)
        except UserError:  # its spacing has no such number of steps
            continue
        done = of.paint(of.cascade.replace(stage), some.captions, given, f"{steps} steps")
        pictures.insert(0, done[last])
        titles = [f"{steps} steps: {text}" for text in some.captions] + titles
    return {last: torch.cat(pictures), "caption": titles}
