"""The choices that can be made about a stage when it is sampled.

`cascade.yaml`, `--set` and the cells of sweeps all make them. To add a choice, add a field to
`SamplingChoices`: its annotation says which values a file may hold, and the function next to it
applies them to a stage.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cascade.adapters.lora import fuse
from cascade.adapters.words import learned
from cascade.config.compose import built, composed
from cascade.config.overrides import assigned
from cascade.diffusion import guidance
from cascade.errors import UserError
from cascade.latents.codec import Latent
from cascade.pipeline import BestOf, Link, TextEmbedding, Without, innermost
from cascade.runs.averages import averaged
from cascade.runs.control import joined
from cascade.runs.run import Run
from cascade.stage import Stage

Apply = Callable[[Any, Any, Run | None], Link]  # (stage, value, the stage's run)


def _choice(apply: Apply, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """A field with the function that applies its value. None: not chosen.

    Args:
        read: converts the value of a file, which may be a list, or a whole number for a float.
    """
    return field(default=None, metadata={"apply": apply, "read": read})


def _option(
    name: str, read: Callable[[Any], Any], make: Callable[[Any], Any] = lambda value: value
) -> Any:
    """A choice that sets an option of the stage's sampler to what `make` returns for the value."""

    def apply(stage: Stage, value: Any, run: Run | None) -> Stage:
        if name not in {one.name for one in fields(stage.sampler)}:
            raise UserError(f"{type(stage.sampler).__name__} has no {name}")
        stage.sampler = replace(stage.sampler, **{name: make(value)})
        return stage

    return _choice(apply, read)


def _pair(levels: Sequence[float | int]) -> tuple[float, ...]:
    if len(levels) != 2:
        raise UserError(f"interval={levels}: give [low, high]")
    return tuple(map(float, levels))


def _sources(names: Sequence[str]) -> tuple[str, ...]:
    if not set(names) <= {"caption", "clip_image"}:
        raise UserError(f"without={names}: give [caption] or [clip_image]")
    return tuple(names)


def _weighted(entries: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    for one in entries:
        if not isinstance(one, Mapping) or not {"path"} <= one.keys() <= {"path", "weight"}:
            raise UserError(f"adapters: {one} is no {{path: RUN, weight: 1.0}}")
        weight = one.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise UserError(f"adapters: the weight of {one['path']}, {weight}, is no number")
    return tuple(entries)


def _own(stage: Stage) -> Stage:
    """A copy of a stage with weights of its own."""
    return stage.altered(**{name: copy.deepcopy(m) for name, m in stage.named_children()})


def _average(stage: Stage, length: float, run: Run) -> Stage:
    averaged(other := _own(stage), run, length)
    return other


def _fused(stage: Stage, adapters: Sequence[Mapping[str, Any]], run: Run) -> Stage:
    weighted = [(Path(one["path"]), float(one.get("weight", 1.0))) for one in adapters]
    fuse(other := _own(stage), weighted)
    return other


def _other_sampler(stage: Stage, name: str, run: Run | None) -> Stage:
    stage.sampler = built(composed("sampler", [assigned("sampler", name)]).sampler)
    return stage


def _noise_level(stage: Stage, level: float, run: Run | None) -> Stage:
    if stage.corruption is None:
        raise UserError("its input is not corrupted, so it has no level")
    stage.corruption = replace(stage.corruption, level=level)
    return stage


def _weaker(stage: Stage, name: str, run: Run) -> Stage:
    other = Run(run.path.parent / name)
    ours, theirs = run.config.stage, other.config.stage
    for part in ("codec", "process"):
        if ours.get(part) != theirs.get(part):
            raise UserError(f"weaker={name}: its {part} is not that of {run.path.name}")
    stage.weaker = other.load().to(stage.device)
    return stage


def _of_prior(link: Link) -> Link:
    """Return a link whose output can be compared with the caption's embedding.

    Raises:
        UserError: it samples something else, such as pictures.
    """
    if link.writes != "clip_image":
        raise UserError(f"it samples {link.writes}: choose best_of or text_embedding for a prior")
    return link


@dataclass(frozen=True)
class SamplingChoices:
    """Choices for one stage; those that are None leave it as it was trained.

    They are applied in this order.

    Args:
        text_embedding: sample nothing and use the caption's CLIP embedding; no other choice counts.
        length: of the average of the weights, for runs that keep averages (`averages=power`).
        sampler: another sampler than the run's, by its name in conf/sampler/.
        scale: of guidance.
        steps: of the sampler.
        interval: noise levels (low, high] with guidance.
        rescale: factor by which guidance is rescaled.
        percentile: of dynamic thresholding, in (0, 1].
        level: of the noise in the low-resolution picture.
        weaker: the run next to this one that guidance leads away from (autoguidance).
        controls: further runs next to this one, whose ControlNets steer its network as well.
        words: runs that learned words (textual inversion), which captions may have then.
        adapters: runs of LoRAs, as [{path: RUN, weight: 1.0}, ...], which are added to its weights.
        without: the sources ("caption", "clip_image") to drop.
        best_of: number of draws, of which the closest to the caption is kept.
        run: the run's directory, from cascade.yaml; by default it has the stage's name.

    Raises:
        UserError: a value out of range.
    """

    text_embedding: bool | None = _choice(
        lambda stage, on, _: TextEmbedding(_of_prior(stage)) if on else stage
    )
    length: float | None = _choice(_average, float)
    sampler: str | None = _choice(_other_sampler)
    scale: float | None = _option("scale", float)
    steps: int | None = _option("steps", int)
    interval: tuple[float, Annotated[float, "inf"]] | None = _option("interval", _pair)
    rescale: float | None = _option("guide", float, lambda phi: partial(guidance.rescale, phi=phi))
    percentile: float | None = _option(
        "threshold", float, lambda p: partial(guidance.dynamic_threshold, percentile=p)
    )
    level: float | None = _choice(_noise_level, float)
    weaker: str | None = _choice(_weaker)
    controls: tuple[str, ...] | None = _choice(joined, tuple)
    words: tuple[str, ...] | None = _choice(
        lambda stage, paths, _: learned(stage, list(map(Path, paths))), tuple
    )
    adapters: tuple[Mapping[str, Any], ...] | None = _choice(_fused, _weighted)
    without: tuple[str, ...] | None = _choice(
        lambda stage, sources, _: Without(stage, sources) if sources else stage, _sources
    )
    best_of: int | None = _choice(
        lambda stage, n, _: BestOf(_of_prior(stage), n) if n > 1 else stage
    )
    run: str | None = _choice(lambda stage, *_: stage)  # was used to find the stage

    def __post_init__(self):
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise UserError(f"percentile={self.percentile}: give a number above 0 and at most 1")

    @classmethod
    def of(cls, name: str, choices: Mapping[str, Any] | None) -> "SamplingChoices":
        """The choices that a cascade file makes for the stage `name`.

        Raises:
            UserError: there is no such choice, or a value is out of range.
        """
        read = {one.name: one.metadata["read"] for one in fields(cls)}
        given = {choice: value for choice, value in (choices or {}).items() if value is not None}
        if unknown := [choice for choice in given if choice not in read]:
            raise UserError(f"{name}.{unknown[0]}: the choices of a stage are {', '.join(read)}")
        try:
            return cls(**{choice: read[choice](value) for choice, value in given.items()})
        except UserError as error:
            raise UserError(f"{name}.{error}") from None

    def applied(self, stage: Stage, run: Run | None = None) -> Link:
        """A copy of the stage, with the same parameters, that is sampled as chosen.

        Args:
            run: of the stage; a `weaker` one is looked for next to it.

        Raises:
            UserError: the stage does not have what is chosen, such as an option of its sampler.
        """
        link: Link = stage.altered()
        try:
            for one in fields(self):
                value = getattr(self, one.name)
                if value is not None and not isinstance(link, TextEmbedding):
                    link = one.metadata["apply"](link, value, run)
            if isinstance(stage.codec, Latent):
                stage.codec.check_sampler(innermost(link).sampler)
        except UserError as error:
            raise UserError(f"{run.path}: {error}" if run else str(error)) from None
        return link
