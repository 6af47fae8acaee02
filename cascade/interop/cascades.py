"""Whole published cascades: their stages, their encoders, and the file that lists them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf

from cascade.config.overrides import assigned
from cascade.encoders.weights import NotHere
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text
from cascade.interop import deepfloyd, glide
from cascade.interop.imported import Imported
from cascade.interop.systems import imported
from cascade.interop.text_towers import text_tower
from cascade.runs.agreement import check_links
from cascade.runs.run import CASCADE, Run

OPENAI_CLIP = "ViT-L-14.pt"  # Karlo's folder holds it as OpenAI publishes it
T5 = "t5-v1_1-xxl"


@dataclass(frozen=True)
class Whole:
    """A cascade of another system.

    Attributes:
        stages: by name, in the order of sampling.
        overrides: of every stage's configuration.
        clip: writes the directory of its CLIP; None: it has none, or none in its folder.
    """

    stages: Mapping[str, Imported]
    overrides: Sequence[str] = ()
    clip: Callable[[Path], None] | None = field(default=None)

    def write(self, out: Path, overrides: Sequence[str] = ()) -> None:
        """Write the model, whole or not at all.

        Args:
            overrides: of every stage's configuration; they have the last word. With a `clip.path`
                among them, no CLIP is written.

        Raises:
            UserError: the directory exists, a stage's tensors and configuration do not fit, or the
                stages or their CLIP do not belong together.
        """
        if out.exists():
            raise UserError(f"{out} exists: choose another --out")
        clip = None if any(o.lstrip("+").startswith("clip.path=") for o in overrides) else self.clip
        own = [assigned("clip.path", out / "clip"), "clip.checkpoint=null"] if clip else []
        chosen = [*self.overrides, *own, *overrides]
        writers = {name: one.writer(out / name, chosen)[1] for name, one in self.stages.items()}

        def write(folder: Path) -> None:
            folder.mkdir()
            for name, write_run in writers.items():
                write_run(folder / name)
            if clip is not None:
                clip(folder / "clip")
            self._check(folder, out)
            text = OmegaConf.to_yaml({"stages": {name: {} for name in self.stages}})
            write_text(folder / CASCADE, text)

        write_atomically(out, write)

    def _check(self, folder: Path, out: Path) -> None:
        """Raises UserError if the stages in a folder, which becomes `out`, are of several CLIPs."""
        runs = {name: Run(folder / name) for name in self.stages}
        try:
            with torch.device("meta"):
                check_links({name: (run, run.stage()) for name, run in runs.items()})
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(out))) from None


def _karlo(source: Path) -> Whole:
    """The folder of diffusers' pipeline, or one with the three checkpoints of the authors."""
    kinds = {"prior": "karlo-prior", "decoder": "karlo-decoder", "sr256": "karlo-sr"}
    stages = {name: imported(kind, source) for name, kind in kinds.items()}
    if (source / "text_encoder").is_dir():
        return Whole(stages, clip=text_tower(source / "text_encoder"))
    if (file := source / OPENAI_CLIP).is_file():
        return Whole(stages, [assigned("clip.path", file.absolute()), "clip.checkpoint=null"])
    return Whole(stages)


def _glide(source: Path) -> Whole:
    return Whole({"base": glide.base(source), "sr256": glide.upsampler(source)})


def _if(source: Path) -> Whole:
    """A folder that holds those of stages I and II, and perhaps T5's (t5-v1_1-xxl)."""
    stages = {}
    for name, number in (("base", "I"), ("sr256", "II")):
        found = sorted(
            path for path in source.glob("IF-*") if path.name.startswith(f"IF-{number}-")
        )
        if len(found) != 1:
            raise NotHere(
                f"{source} holds {len(found)} folders IF-{number}-*, not one: put it there"
            )
        inner = found[0] / "unet"
        stages[name] = deepfloyd.stage(inner if inner.is_dir() else found[0], number)
    t5 = source / T5
    own = [assigned("text.reader.path_or_name", t5.absolute())] if t5.is_dir() else []
    return Whole(stages, own)


CASCADES: Mapping[str, Callable[[Path], Whole]] = {"karlo": _karlo, "glide": _glide, "if": _if}


def whole(kind: str, source: Path) -> Whole:
    """Reads all stages of a published cascade.

    Args:
        kind: of `CASCADES`.

    Raises:
        UserError: a file is missing or damaged.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give that of the whole {kind}")
    return CASCADES[kind](source)
