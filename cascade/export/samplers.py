"""How a stage is sampled, as a scheduler of diffusers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from cascade.diffusion.guidance import extrapolate, static_threshold
from cascade.diffusion.noise import table
from cascade.diffusion.solvers import ancestral, ddim
from cascade.diffusion.spacing import sections
from cascade.export.layouts import VERSION, check_process, refused
from cascade.export.model import Part
from cascade.runs.choices import SamplingChoices

STEPS = 1000  # of every table
_V = "v_prediction"
_CHOICES = ("scale", "steps", "level")  # that the caller of the networks makes, or that are checked


def sampled(part: Part, whole: bool) -> Any:
    """The stage with the cascade's choices.

    Args:
        whole: as part of a pipeline, whose scheduler takes evenly spaced ancestral steps alone.

    Raises:
        UserError: diffusers cannot make one of the choices.
    """
    choices = part.choices or {}
    if other := [key for key, value in choices.items() if value and key not in _CHOICES]:
        raise refused(part.name, other[0], choices[other[0]], "it to be left out")
    if part.stage.control:
        raise refused(part.name, "stage.control", list(part.stage.control), "no ControlNets")
    stage: Any = SamplingChoices.of(part.name, choices).applied(part.stage, part.run)
    sampler = stage.sampler
    wanted: dict[str, Sequence[Any]] = {"solver": (ancestral, ddim), "guide": (extrapolate,)}
    if whole:
        wanted = {"solver": (ancestral,), "spacing": (sections,), "guide": (extrapolate,)}
    for name, known in wanted.items():
        if (found := getattr(sampler, name, None)) not in known:
            names = " or ".join(one.__name__ for one in known)
            raise refused(part.name, f"sampler.{name}", _name(found), names)
    for name, plain in (("interval", None), *([("init", 1.0)] if whole else [])):
        if (found := getattr(sampler, name)) != plain:
            raise refused(part.name, f"sampler.{name}", found, str(plain))
    return stage


def pipeline_scheduler(stage: Any, part: Part) -> dict[str, Any]:
    """The configuration of the `UnCLIPScheduler` that unCLIP's pipeline calls."""
    prediction, variance, _ = check_process(part.run.config.stage, part.name, ("cosine_table",))
    if prediction == _V:
        raise refused(part.name, "process.prediction", "v", "eps or x0 in a pipeline")
    _check_levels(stage, part.name)
    limit = _limit(stage.sampler.threshold, part.name)
    return {
        "_class_name": "UnCLIPScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": STEPS,
        "prediction_type": prediction,
        "variance_type": variance,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": limit is not None,
        "clip_sample_range": limit or 1.0,
    }


def scheduler(stage: Any, part: Part) -> dict[str, Any]:
    """The configuration of a scheduler that takes any indices of the table as its steps.

    It is `DDPMScheduler` for ancestral steps, and for DDIM's `DPMSolverMultistepScheduler` of order
    1, which is the same (`DDIMScheduler` takes even steps alone).
    """
    prediction, variance, schedule = check_process(part.run.config.stage, part.name)
    _check_levels(stage, part.name)
    limit = _limit(stage.sampler.threshold, part.name)
    about = {
        "_diffusers_version": VERSION,
        "num_train_timesteps": STEPS,
        "prediction_type": prediction,
        "beta_schedule": schedule,
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    if stage.sampler.solver is ancestral:
        about |= {"variance_type": variance, "clip_sample": limit is not None}
        return {"_class_name": "DDPMScheduler", **about, "clip_sample_range": limit or 1.0}
    if limit not in (None, 1.0):
        raise refused(part.name, "sampler.threshold.limit", limit, "1, for DDIM")
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **about,
        "solver_order": 1,
        "final_sigmas_type": "zero",
        "variance_type": variance if variance == "learned_range" else None,
        "thresholding": limit is not None,  # with this greatest value it clamps to [-1, 1]
        "sample_max_value": 1.0,
    }


def timesteps(stage: Any, part: Part) -> list[int]:
    """The indices of the table that the sampler visits. UserError if it visits other levels."""
    levels = table(stage.process.schedule, STEPS)
    asked: Float64[Tensor, " n"] = stage.sampler.logsnrs(stage.process)[:-1]
    distances, indices = (asked[:, None] - levels).abs().min(1)
    if distances.max() > 1e-6:
        found = _name(stage.sampler.spacing)
        raise refused(part.name, "sampler.spacing", found, f"levels of a table of {STEPS}")
    return indices.tolist()


def first_deviation(stage: Any) -> float:
    """The deviation of the noise that sampling starts with."""
    level = stage.sampler.logsnrs(stage.process)[0]
    return stage.sampler.init * torch.sigmoid(-level).sqrt().item()


def _check_levels(stage: Any, where: str) -> None:
    """Raises UserError if the network reads another index of a level than the scheduler has."""
    features = getattr(stage.net, "net", stage.net).noise_level[0]
    wanted = table(stage.process.schedule, STEPS).float()
    found = getattr(features, "levels", wanted)  # other features are refused with the network
    if len(found) != STEPS or not torch.allclose(found, wanted.to(found), atol=1e-4):
        raise refused(where, "net.level.schedule", "another table", "that of the process")


def _limit(threshold: Any, where: str) -> float | None:
    """The limit of a static threshold; None: there is none. UserError for another kind."""
    if threshold is None:
        return None
    if _called(threshold) is not static_threshold:
        raise refused(where, "sampler.threshold", _name(threshold), "static_threshold or none")
    return threshold.keywords.get("limit", 1.0) if isinstance(threshold, partial) else 1.0


def _called(function: Any) -> Any:
    """The function that a `partial` calls; another is itself."""
    return function.func if isinstance(function, partial) else function


def _name(function: Any) -> str:
    return getattr(_called(function), "__name__", str(function))
