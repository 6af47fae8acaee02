"""Distillation: the configuration of a student, and its teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cascade.batch import Batch
from cascade.config.compose import composed
from cascade.config.overrides import assigned
from cascade.data.loading import chosen
from cascade.diffusion.gaussian import Denoised
from cascade.errors import UserError
from cascade.roles import Lesson
from cascade.runs.cascade_file import stage_choices, stage_runs
from cascade.runs.choices import SamplingChoices
from cascade.runs.run import CASCADE, Run
from cascade.stage import Stage

_OTHER = (
    "run",
    "best_of",
    "without",
    "text_embedding",
    "controls",
    "words",
    "adapters",
)  # choices that concern no sampler


@dataclass(frozen=True)
class Teaching:
    """A trained stage that shows another how its own sampler proceeds (`Distilled`): a `Teacher`.

    Both embed the batch, and drop conditions, each with its own conditioner, for the same samples.
    """

    stage: Stage

    def __call__(self, batch: Batch, student: Stage) -> Lesson:
        """Shows what carries some rows of an encoded batch from one noise level to another."""
        stage = self.stage.to(student.device)
        sampler: Any = stage.sampler

        @torch.no_grad()
        def carry(rows: Tensor, x: Tensor, logsnrs: Tensor) -> Tensor:
            some = chosen(batch, rows)
            cond = stage.conditioner(some, student.draws("drop", some))
            net = stage.noisy(some, lambda: student.draws("augmentation", some))
            weaker = stage.weaker_on(some, some, net) if sampler.scale != 1 else None
            denoise = sampler.denoiser(stage.process, net, cond, weaker)
            return sampler.solver(denoise, x, logsnrs, None)

        return Lesson(carry)


def student(config: DictConfig) -> DictConfig:
    """Returns the configuration of the training that conf/distill.yaml describes.

    It is the teacher's but for the process, the sampler and what `config` sets, and names the
    teacher with its sampling choices, so that `cascade train --config` resumes it.

    Raises:
        UserError: the teacher is no diffusion stage, or samples at random, or its steps are not a
            multiple of the student's.
    """
    run = Run(Path(config.teacher))
    choices = {**_chosen(run), **OmegaConf.to_container(config.choices or OmegaConf.create())}
    if wrong := [name for name in _OTHER if name in choices]:
        raise UserError(f"choices.{wrong[0]} says nothing about how a sampler proceeds: omit it")
    whole = OmegaConf.to_container(run.config)
    stage = whole["stage"]
    sampler, process = stage.get("sampler"), stage.get("process")
    if name := choices.get("sampler"):
        sampler = OmegaConf.to_container(composed("sampler", [assigned("sampler", name)]).sampler)
    if not (sampler and process and str(sampler["_target_"]).endswith(".DiffusionSampler")):
        raise UserError(f"{run.path} is no diffusion stage: distil a prior, decoder or sr stage")
    if stage.get("control"):
        raise UserError(f"{run.path} is steered by ControlNets: distil the run that it began with")
    while "process" in process:  # Analytic-DPM's, whose variance a deterministic teacher lacks
        process = process["process"]
    if not process["_target_"].endswith(".Diffusion"):
        raise UserError(f"{run.path} learned a variance, which steps of a student do not have")
    steps = choices.get("steps") or sampler["steps"]
    by, rest = divmod(steps, config.steps)
    if rest or by < 2:
        raise UserError(
            f"{run.path} samples in {steps} steps, which is no multiple of steps={config.steps}: "
            f"set choices.steps={4 * config.steps}, for example"
        )
    spacing = {"spacing": sampler["spacing"]} if "spacing" in sampler else {}
    stage["process"] = {
        "_target_": "cascade.diffusion.distillation.Distilled",
        **{"process": process, "steps": config.steps, "by": by, **spacing},
    }
    thinned = {"_target_": "cascade.diffusion.spacing.thinned", "_partial_": True, "by": by}
    stage["sampler"] = {
        **_ddim(),
        **{"steps": config.steps, "init": sampler.get("init", 1.0)},
        "spacing": {**thinned, **spacing},
    }
    whole |= {key: config[key] for key in ("run", "images", "ema", "seed", "grids", "workers")}
    whole |= {
        "process": stage["process"],
        "sampler": stage["sampler"],
        "name": Path(config.run).name,
    }
    whole["micro_batch"] = config.micro_batch or whole["micro_batch"]
    if "logger" in config:
        whole["logger"] = config.logger
    whole["teacher"] = {**choices, "run": config.teacher, "steps": steps}
    for node in (whole, stage):
        node["batch"] = config.batch or node["batch"]
        node["seed"] = config.seed
        if "total" in (rate := node.get("learning_rate") or {}):
            rate["total"] = config.images
    if config.lr is not None:
        stage["optimizer"]["lr"] = config.lr
    return OmegaConf.create(whole)


def teach(module: Stage, teacher: DictConfig, begin: bool) -> None:
    """Gives a student its teacher.

    Args:
        teacher: the directory of its run, and its sampling choices.
        begin: whether to begin with the teacher's weights.

    Raises:
        UserError: the teacher samples at random, or its weights do not fit.
    """
    run = Run(Path(teacher.run))
    stage: Any = SamplingChoices.of(run.path.name, OmegaConf.to_container(teacher)).applied(
        run.load(), run
    )
    try:
        levels = stage.sampler.logsnrs(stage.process)[:3]
        stage.sampler.solver(lambda x, _: Denoised(x), torch.zeros(1, 1), levels, None)
    except (TypeError, ValueError):
        raise UserError(f"{run.path} samples at random: set choices.sampler=ddim") from None
    module.teacher = Teaching(stage)
    if begin:
        own = module.state_dict()
        module.load_state_dict({k: v for k, v in stage.state_dict().items() if k in own})


def _chosen(run: Run) -> dict[str, Any]:
    """How a cascade file next to a run, if there is one, samples it."""
    file = run.path.parent / CASCADE
    if not file.exists():
        return {}
    names = [name for name, path in stage_runs(file).items() if path.name == run.path.name]
    of = stage_choices(file, ())[names[0]] if names else None
    return {name: value for name, value in (of or {}).items() if name not in _OTHER}


def _ddim() -> dict[str, Any]:
    target = "cascade.diffusion.sampling.DiffusionSampler"
    solver = {"_target_": "hydra.utils.get_method", "path": "cascade.diffusion.solvers.ddim"}
    return {"_target_": target, "solver": solver}
