"""Finds the files of a pretrained CLIP on this machine, and how to build a model from them.

Nothing is ever fetched: a `UserError` says which file is missing and where to put it. A model is a
directory, a file, or a name whose files are given or in the local Hugging Face cache. Weights do
not reveal whether their model uses GELU or QuickGELU, so another source has to tell.
"""

import ast
import hashlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cascade.encoders.published import hugging_face, openai
from cascade.encoders.published.archive import is_archive, read_archive
from cascade.encoders.published.files import state_in
from cascade.encoders.published.names import alias
from cascade.encoders.weights import NotHere, read_json
from cascade.errors import UserError
from cascade.formats.texts import read

CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_CLIP_FILES = (CLIP_WEIGHTS, "open_clip_pytorch_model.bin")  # in this order


class CLIPSource(NamedTuple):
    """Arguments of `open_clip.CLIP`, mean and std of its pictures (values in [0, 1]), weights.

    `again`: whether earlier versions built the same model from the same settings.
    """

    model: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Path
    again: bool = True

    @property
    def choices(self) -> dict[str, Any]:
        """Everything besides the weights that the output depends on, defaults left out."""
        defaults = {"vision_cfg": "CLIPVisionCfg", "text_cfg": "CLIPTextCfg"}
        towers = {
            part: {k: v for k, v in self.model[part].items() if v != default_of(name).get(k)}
            for part, name in defaults.items()
        }
        quick = _quick(self.model)
        return {**self.model, **towers, "quick_gelu": quick, "mean": self.mean, "std": self.std}

    @property
    def doubtful(self) -> frozenset[str]:
        """Names under which earlier versions may have built another CLIP from the same weights.

        They used the activation of the name, and OpenAI's normalisation.
        """
        import open_clip

        names, quick = open_clip.list_models(), _quick(self.model)
        if (self.mean, self.std) != _normalisation({}):
            return frozenset(names)
        return frozenset(n for n in names if _quick(open_clip.get_model_config(n)) != quick)


def module_file(name: str) -> Path:
    """The source of one of open_clip's modules, whose package takes seconds to import."""
    return Path(find_spec("open_clip").submodule_search_locations[0]) / f"{name}.py"


@cache
def default_of(config: str) -> dict[str, Any]:
    """The defaults of `CLIPTextCfg` or `CLIPVisionCfg`, read from open_clip's source."""
    tree = ast.parse(read(module_file("model")))
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == config)
    fields = [field for field in found.body if isinstance(field, ast.AnnAssign)]
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


def clip_source(
    path_or_name: str, checkpoint: str | None = None, quick_gelu: bool | None = None
) -> CLIPSource:
    """Finds the CLIP in a directory, or one of open_clip's by name and file or tag.

    Args:
        quick_gelu: the activation, if no other source tells.

    Raises:
        NotHere: files are missing.
        UserError: the text tower or tokenizer is another library's; the activation is unknown, or
            two sources contradict each other; a checkpoint is given together with a directory.
    """
    if Path(path_or_name).is_dir():
        found = _clip_directory(Path(path_or_name), checkpoint, quick_gelu)
    elif Path(path_or_name).is_file():
        found = _clip_single(Path(path_or_name), checkpoint, quick_gelu)
    else:
        found = _clip_named(path_or_name, checkpoint, quick_gelu)
    model = found.model
    foreign = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & model["text_cfg"].keys()
    if model.pop("custom_text", False) or foreign:
        raise UserError(f"{path_or_name} has a text tower of its own: choose another CLIP")
    if "timm_model_name" in model["vision_cfg"]:
        model["vision_cfg"]["timm_model_pretrained"] = False  # otherwise timm would fetch weights
        if ":" in model["vision_cfg"]["timm_model_name"]:  # "hf-hub:..." would be fetched as well
            raise UserError(f"{path_or_name} has a picture tower of a hub: choose another CLIP")
    return found


def clip_model(path_or_name: str) -> dict[str, Any] | None:
    """Arguments of `open_clip.CLIP`, if they are known without the weights.

    Raises:
        UserError: the configuration is damaged.
    """
    file = Path(path_or_name) / CLIP_CONFIG
    if file.is_file():
        return _configured(file)[0]
    if hugging_face.is_folder(file.parent):
        return hugging_face.model_in(file.parent)
    if Path(path_or_name).exists():
        return None
    import open_clip

    name = alias(path_or_name)[0]
    known = name in open_clip.list_models()  # other names would be looked up on the network
    return open_clip.get_model_config(name) if known else None


def _quick(model: dict[str, Any]) -> bool:
    return bool(model.get("quick_gelu", False))


def _agreed(file: Path, claims: dict[str, bool | None]) -> bool | None:
    """The activation that all sources agree on, if any tells. UserError if two differ."""
    known = {who: quick for who, quick in claims.items() if quick is not None}
    if len(set(known.values())) > 1:
        words = [f"{who} says {'QuickGELU' if quick else 'GELU'}" for who, quick in known.items()]
        raise UserError(f"{file}: {', but '.join(words)}: correct the one that is wrong")
    return next(iter(known.values()), None)


def _clip_directory(folder: Path, checkpoint: str | None, quick_gelu: bool | None) -> CLIPSource:
    if checkpoint is not None:
        raise _ignored(checkpoint, f"{folder} is a directory with weights of its own")
    if not (folder / CLIP_CONFIG).is_file() and hugging_face.is_folder(folder):
        model, weights = hugging_face.model_in(folder), hugging_face.weights_in(folder)
        _agreed(weights, {hugging_face.CONFIG: _quick(model), "quick_gelu": quick_gelu})
        return CLIPSource(model, *hugging_face.normalisation_in(folder), weights)
    found = [folder / name for name in _CLIP_FILES if (folder / name).is_file()]
    if not (folder / CLIP_CONFIG).is_file() or not found:
        raise NotHere(f"{folder} is not a CLIP: put its {CLIP_CONFIG} and {CLIP_WEIGHTS} there")
    model, mean, std = _configured(folder / CLIP_CONFIG)
    _agreed(found[0], {CLIP_CONFIG: _quick(model), "quick_gelu": quick_gelu})
    return CLIPSource(model, mean, std, found[0])


def _ignored(checkpoint: str, why: str) -> UserError:
    return UserError(
        f"checkpoint={checkpoint} would be ignored: {why}; leave checkpoint out (in a "
        "configuration: null), or give a name such as ViT-L-14 with it"
    )


def _clip_single(file: Path, checkpoint: str | None, quick_gelu: bool | None) -> CLIPSource:
    """A file of OpenAI's, alone: an archive, or a state dict that was published."""
    if checkpoint is not None:
        raise _ignored(checkpoint, f"{file} is a file of weights")
    model = openai.sizes_of(state_in(file, file.name, shapes=True), file)
    shown, published = _shown(file), _published(file)
    if shown is None and published is None:
        raise UserError(
            f"{file} shows neither its activation nor how its pictures are normalised: put it into "
            f"a directory as {_CLIP_FILES[1]}, with an {CLIP_CONFIG} that says them"
        )
    claims = {"its archive": shown, "its SHA-256, of a published file,": published}
    model["quick_gelu"] = _agreed(file, {**claims, "quick_gelu": quick_gelu})
    return CLIPSource(model, *_normalisation({}), file)


def _shown(file: Path) -> bool | None:
    """The activation of an archive; None: another file, or an archive that does not show it."""
    return openai.activation_of(read_archive(file)) if is_archive(file) else None


def _configured(file: Path) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    config = read_json(file)
    try:
        model = config["model_cfg"]
        _ = model["embed_dim"], model["vision_cfg"].keys(), model["text_cfg"].keys()
        return model, *_normalisation(config.get("preprocess_cfg", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no configuration of open_clip's: fetch it again") from error


def _normalisation(pictures: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not {"mean", "std"} <= pictures.keys():
        import open_clip

        openai = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        pictures = openai | pictures
    return tuple(pictures["mean"]), tuple(pictures["std"])


def _clip_named(name: str, checkpoint: str | None, quick_gelu: bool | None) -> CLIPSource:
    import open_clip

    name, tag = alias(name)
    if tag and checkpoint not in (None, tag) and not Path(checkpoint).is_file():
        raise _ignored(checkpoint, f"the name says {tag}")
    checkpoint = checkpoint or tag
    if name not in open_clip.list_models():
        raise NotHere(
            f"{name} is neither a directory nor a CLIP that open_clip knows: put {CLIP_CONFIG} and "
            f"{CLIP_WEIGHTS} there, or give a name such as ViT-L-14"
        )
    model = open_clip.get_model_config(name)
    if checkpoint and Path(checkpoint).is_file():
        return _clip_file(name, model, Path(checkpoint), quick_gelu)
    pretrained = open_clip.get_pretrained_cfg(name, checkpoint) if checkpoint else {}
    if not pretrained.get("hf_hub"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise NotHere(
            f"{name}: no file or tag checkpoint={checkpoint}; give the file of its weights, or a "
            f"tag whose weights are in the local Hugging Face cache ({tags})"
        )
    weights = _cached_clip(pretrained["hf_hub"])
    model["quick_gelu"] = _quick(pretrained)
    _agreed(weights, {f"the tag {checkpoint}": _quick(pretrained), "quick_gelu": quick_gelu})
    return CLIPSource(model, *_normalisation(pretrained), weights)


def _clip_file(name: str, model: dict, file: Path, quick_gelu: bool | None) -> CLIPSource:
    """A named CLIP with a file of weights; a configuration next to the file applies to it."""
    named, (mean, std) = _quick(model), _normalisation({})
    claims = {f"the name {name}": named or None, "quick_gelu": quick_gelu}
    if file.name in _CLIP_FILES and (file.parent / CLIP_CONFIG).is_file():
        own, mean, std = _configured(file.parent / CLIP_CONFIG)
        claims[f"{CLIP_CONFIG} next to it"] = _quick(own)
    claims["its archive"] = _shown(file)
    claims["its SHA-256, of a published file,"] = _published(file)
    quick = _agreed(file, claims)
    if quick is None:
        raise UserError(f"{file} does not show its activation: {_choices(name)}")
    model["quick_gelu"] = quick
    again = quick == named and (mean, std) == _normalisation({})
    return CLIPSource(model, mean, std, file, again)


def _choices(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    quick = [tag for tag in tags if _quick(open_clip.get_pretrained_cfg(name, tag))]
    plain = [tag for tag in tags if tag not in quick]
    return (
        f"give quick_gelu=true (--quick-gelu true) if its weights are such as "
        f"{', '.join(quick) or 'OpenAI'}, or false for such as {', '.join(plain) or 'LAION'}"
    )


def _published(file: Path) -> bool | None:
    """The activation of a published file that open_clip knows by its SHA-256."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return next((quick for start, quick in _digests().items() if digest.startswith(start)), None)


@cache
def _digests() -> dict[str, bool]:
    """Activations by SHA-256, or its first eight digits, from the URLs that open_clip lists."""
    import open_clip

    found = {}
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(name, tag)
        address = config.get("url") or ""
        if match := re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", address):
            found[match[1] or match[2]] = _quick(config)
    return found


def _cached_clip(address: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = address.rpartition("/")
    for name in [file] if file else _CLIP_FILES:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    raise NotHere(
        f"the weights are not in the local Hugging Face cache: fetch {file or CLIP_WEIGHTS} of "
        f"{repository}, and give that file as checkpoint"
    )
