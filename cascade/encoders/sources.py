"""Where the files of a pretrained model are on this machine.

Nothing is ever fetched: what is missing is a `UserError` that says what to fetch and where to put
it. A model is a directory, or a name whose files are given or lie in the local Hugging Face cache.
Weights are strangers' files: they are safetensors, or what torch loads with `weights_only`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.serialization import get_unsafe_globals_in_checkpoint

from cascade.errors import UserError

CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_CLIP_FILES = (CLIP_WEIGHTS, "open_clip_pytorch_model.bin")  # in this order


def weights_hash(files: Iterable[Path]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of some files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


@contextmanager
def reading(weights: Sequence[Path], whose: str) -> Iterator[None]:
    """Within it weights are loaded, by a loader that runs no code in them.

    Raises:
        UserError: the loader raised; the message names the code that is in the files, if any.
    """
    try:
        yield
    except Exception as error:  # damaged, pickled code, or of another architecture
        code = sorted({name for path in weights for name in _code(path)})
        why = f"they would run {', '.join(code[:3])}" if code else type(error).__name__
        names = ", ".join(map(str, weights))
        raise UserError(
            f"{names} are not weights of {whose} that can be read safely ({why}): fetch them "
            "again, as safetensors"
        ) from error


def _code(path: Path) -> list[str]:
    """What a checkpoint of torch would call when it is unpickled; it is only looked through."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive that torch wrote
        return []


class CLIPSource(NamedTuple):
    """Arguments of `open_clip.CLIP`, mean and std of its pictures (values in [0, 1]), weights."""

    model: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Path


def clip_source(path_or_name: str, checkpoint: str | None) -> CLIPSource:
    """The CLIP in a directory, or one of open_clip's by name and file or tag.

    Raises:
        UserError: files are missing, or the text tower or tokenizer is another library's.
    """
    import open_clip

    if Path(path_or_name).is_dir():
        model, pictures, weights = _clip_directory(Path(path_or_name))
    elif path_or_name in open_clip.list_models():
        model, pictures, weights = _clip_named(path_or_name, checkpoint)
    else:
        raise UserError(
            f"{path_or_name} is neither a directory nor a CLIP that open_clip knows: put "
            f"{CLIP_CONFIG} and {CLIP_WEIGHTS} there, or give a name such as ViT-L-14"
        )
    foreign = {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"} & model["text_cfg"].keys()
    if model.pop("custom_text", False) or foreign:
        raise UserError(f"{path_or_name} has a text tower of its own: choose another CLIP")
    if "timm_model_name" in model["vision_cfg"]:
        model["vision_cfg"]["timm_model_pretrained"] = False  # or timm would fetch weights
        if ":" in model["vision_cfg"]["timm_model_name"]:  # "hf-hub:...": it would fetch as well
            raise UserError(f"{path_or_name} has a picture tower of a hub: choose another CLIP")
    mean = pictures.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = pictures.get("std", open_clip.OPENAI_DATASET_STD)
    return CLIPSource(model, tuple(mean), tuple(std), weights)


def clip_model(path_or_name: str) -> dict[str, Any] | None:
    """Arguments of `open_clip.CLIP`, as far as they are known without weights.

    Raises:
        UserError: the configuration is damaged.
    """
    import open_clip

    file = Path(path_or_name) / CLIP_CONFIG
    if file.is_file():
        return _read_json(file)["model_cfg"]
    known = path_or_name in open_clip.list_models()  # others might be looked for in the network
    return open_clip.get_model_config(path_or_name) if known else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: fetch it again") from error


def _clip_directory(folder: Path) -> tuple[dict, dict, Path]:
    found = [folder / name for name in _CLIP_FILES if (folder / name).is_file()]
    if not (folder / CLIP_CONFIG).is_file() or not found:
        raise UserError(f"{folder} is not a CLIP: put its {CLIP_CONFIG} and {CLIP_WEIGHTS} there")
    config = _read_json(folder / CLIP_CONFIG)
    return config["model_cfg"], config.get("preprocess_cfg", {}), found[0]


def _clip_named(name: str, checkpoint: str | None) -> tuple[dict, dict, Path]:
    import open_clip

    model = open_clip.get_model_config(name)
    if checkpoint and Path(checkpoint).is_file():
        return model, {}, Path(checkpoint)
    pretrained = open_clip.get_pretrained_cfg(name, checkpoint) if checkpoint else {}
    if not pretrained.get("hf_hub"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise UserError(
            f"{name}: no file or tag checkpoint={checkpoint}; give the file of its weights, or a "
            f"tag whose weights are in the local Hugging Face cache ({tags})"
        )
    model["quick_gelu"] = pretrained.get("quick_gelu", False)
    return model, pretrained, _cached_clip(pretrained["hf_hub"])


def _cached_clip(address: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = address.rpartition("/")
    for name in [file] if file else _CLIP_FILES:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    raise UserError(
        f"the weights are not in the local Hugging Face cache: fetch {file or CLIP_WEIGHTS} of "
        f"{repository}, and give that file as checkpoint"
    )


class T5Source(NamedTuple):
    """A directory in the format of transformers, and the weights in it."""

    directory: Path
    weights: list[Path]


def t5_source(path_or_name: str) -> T5Source:
    """The T5 in a directory, or in the local Hugging Face cache by name.

    Raises:
        UserError: files are missing.
    """
    folder = _t5_directory(path_or_name)
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    tokenizer = (folder / "spiece.model").exists() or (folder / "tokenizer.json").exists()
    present = {
        "config.json": (folder / "config.json").exists(),
        "spiece.model or tokenizer.json": tokenizer,
        "model.safetensors": bool(weights),
    }
    if missing := [name for name, there in present.items() if not there]:
        raise UserError(f"{folder} is not a whole T5: put its {', '.join(missing)} there")
    return T5Source(folder, weights)


def t5_width(path_or_name: str) -> int:
    """Width of the states of such a T5; its weights need not be there.

    Raises:
        UserError: its config.json is missing or damaged.
    """
    file = _t5_directory(path_or_name) / "config.json"
    if not file.is_file():
        raise UserError(f"{file.parent} is not a T5: put its config.json there")
    return _read_json(file)["d_model"]


def _t5_directory(path_or_name: str) -> Path:
    folder = Path(path_or_name)
    return folder if folder.is_dir() else _cached_directory(path_or_name)


def _cached_directory(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise UserError(
            f"{name} is neither a directory nor in the local Hugging Face cache: fetch its "
            "config.json, tokenizer and weights into a directory, and give that"
        ) from None
