"""The systems that `cascade import` knows, by the kind that the command line names."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cascade.errors import UserError
from cascade.interop import deepfloyd, diffusers_unets, glide, guided, karlo, priors
from cascade.interop.files import config_in
from cascade.interop.imported import Imported

KANDINSKY = "Apache-2.0 (ai-forever/Kandinsky-2)"
KANDINSKY_PRIOR = "prior_fp16.ckpt"
UNKNOWN = "not stated in the files: see where they were published"


def _karlo_prior(source: Path) -> Imported:
    return _prior(source, karlo.PRIOR, "Karlo's prior", karlo.LICENSE)


def _kandinsky_prior(source: Path) -> Imported:
    return _prior(source, KANDINSKY_PRIOR, "Kandinsky's prior", KANDINSKY)


def _prior(source: Path, file: str, system: str, license: str) -> Imported:
    source = _part(source, "prior")
    if (source / "config.json").is_file():
        return priors.of_diffusers(source, system, license)
    return priors.published(source, file, system, license)


def _karlo_decoder(source: Path) -> Imported:
    source = _part(source, "decoder")
    if (source / "config.json").is_file():
        return karlo.decoder_of_diffusers(source, source.parent / "text_proj")
    return karlo.decoder(source)


def _karlo_sr(source: Path) -> Imported:
    source = _part(source, "super_res_first")
    if (source / "config.json").is_file():
        return karlo.sr_of_diffusers(source, source.parent / "super_res_last")
    return karlo.sr(source)


def _if_one(source: Path) -> Imported:
    return deepfloyd.stage(_part(source, "unet"), "I")


def _if_two(source: Path) -> Imported:
    return deepfloyd.stage(_part(source, "unet"), "II")


def _diffusers(source: Path) -> Imported:
    """Reads a network by the class that its configuration names."""
    for part in ("prior", "decoder", "unet"):
        if (source / "model_index.json").is_file() and (source / part).is_dir():
            source /= part
    config = config_in(source)
    name = config.get("_class_name")
    if name == "PriorTransformer":
        return priors.of_diffusers(source, "a prior of diffusers", UNKNOWN)
    if name == "UNet2DModel":
        return diffusers_unets.of_classes(source, UNKNOWN)
    diffusers_unets.unet_config(source)  # what cannot be represented is refused first
    if config.get("addition_embed_type") == "text":
        return deepfloyd.stage(source, "II" if config.get("class_embed_type") else "I")
    if (source.parent / "text_proj").is_dir():
        return karlo.decoder_of_diffusers(source, source.parent / "text_proj")
    raise UserError(
        f"{source}/config.json does not tell what its network is conditioned on: only decoders "
        "like Karlo's (beside their text_proj) and stages of DeepFloyd IF are known"
    )


STAGES: Mapping[str, Callable[[Path], Imported]] = {
    "karlo-prior": _karlo_prior,
    "karlo-decoder": _karlo_decoder,
    "karlo-sr": _karlo_sr,
    "kandinsky-prior": _kandinsky_prior,
    "guided-diffusion": guided.network,
    "glide": glide.base,
    "glide-upsampler": glide.upsampler,
    "if-1": _if_one,
    "if-2": _if_two,
    "diffusers": _diffusers,
}


def _part(source: Path, name: str) -> Path:
    """A part of a pipeline's folder, if `source` is one; otherwise `source` itself."""
    return source / name if (source / "model_index.json").is_file() else source


def imported(kind: str, source: Path) -> Imported:
    """Reads a stage of another system.

    Args:
        kind: of `STAGES`.
        source: the file or folder of its weights.

    Raises:
        UserError: the files are not those of such a stage, or are damaged.
    """
    if not source.exists():
        raise UserError(f"{source} is not there: give the file or folder of the weights")
    return STAGES[kind](source)
