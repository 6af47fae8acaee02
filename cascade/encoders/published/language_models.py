"""Language models in folders of transformers' format: their files, network and tokenizer.

The network is the part that reads captions: the encoder of an encoder-decoder, the text part of a
model that also sees pictures, and never a head. Its class is one of transformers' own, chosen by
`model_type`, so no code in the folder is run. The tokenizer is the file `tokenizer.json` as it is.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cascade.encoders.weights import NotHere, read_json, reading
from cascade.errors import UserError

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Settings that change no state, and those by which a file could choose code to fetch or run.
_NO_CHOICES = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_NO_CHOICES |= {"auto_map", "use_cache"}


class ModelFiles(NamedTuple):
    """A folder, its configuration as it is written, and its files of weights."""

    folder: Path
    config: dict[str, Any]
    weights: list[Path]

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def choices(self) -> dict[str, Any]:
        """Everything besides weights and tokenizer that the states depend on."""
        return {"config": self.config}


class Splits(NamedTuple):
    """What the tokenizer puts before and behind each caption: numbers of special tokens."""

    before: list[int]
    behind: list[int]


def is_language_model(folder: Path) -> bool:
    """Whether a folder holds such a model, but not a T5, which has a reader of its own."""
    if not ((folder / CONFIG).is_file() and (folder / TOKENIZER).is_file()):
        return False
    return read_json(folder / CONFIG).get("model_type") not in ("t5", None)


def config_of(folder: Path) -> dict[str, Any]:
    """Reads the settings of config.json that states depend on.

    Raises:
        NotHere: the file is missing.
        UserError: it is damaged, or its weights are quantized.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise NotHere(f"{folder} is not a language model: put its {CONFIG} there")
    config = read_json(file)
    if "quantization_config" in config:
        raise UserError(f"{file} says that the weights are quantized: give the original ones")
    return _kept(config)


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _kept(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NO_CHOICES and not key.endswith("_implementation")
    }


def files_of(folder: Path) -> ModelFiles:
    """Finds a model's files.

    Raises:
        NotHere: one is missing.
        UserError: config.json cannot be used, or the folder holds an adapter of another model.
    """
    config = config_of(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter: merge it into its model, and give that")
    if not (folder / TOKENIZER).is_file():
        raise NotHere(f"{folder} has no {TOKENIZER}: put it there (another form is not read)")
    return ModelFiles(folder, config, weights_in(folder))


def weights_in(folder: Path) -> list[Path]:
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        names = sorted({*named.values()}) if isinstance(named, dict) else []
        if not names or any(name != Path(str(name)).name for name in names):
            raise UserError(f"{folder / INDEX} does not say which files hold the weights")
    for name in names:
        if not (folder / name).is_file():
            raise NotHere(
                f"{folder} has no {name}: put the weights there, as safetensors (pickles are not "
                "read)"
            )
    return [folder / name for name in names]


def built_from(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network without its weights, on the meta device: for its sizes.

    Raises:
        UserError: transformers has no such model, or the configuration is damaged.
    """
    kind, own = _class(config, folder)
    with _refusing(folder), torch.device("meta"):
        return _reader(kind(own, **_without_pooler(kind)))


def _class(config: Mapping[str, Any], folder: Path) -> tuple[type, Any]:
    """The class of the whole model without heads, and its configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder / CONFIG} has model_type {model_type}, which this version of transformers "
            "does not have: choose another model (code in the folder is not run)"
        )
    with _refusing(folder):
        own = CONFIG_MAPPING[model_type].from_dict(dict(config), use_cache=False)
        kind = MODEL_MAPPING[type(own)]
    return (kind[0] if isinstance(kind, list | tuple) else kind), own


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises errors of any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / CONFIG} is no language model's ({type(error).__name__}: {reason})"
        ) from error


def _without_pooler(kind: type) -> dict[str, bool]:
    """BERT's relatives would get a random pooling layer, which no state passes through."""
    pooled = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if pooled else {}


def _reader(model: nn.Module) -> nn.Module:
    """The part of a model that reads captions."""
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    for part in ("language_model", "text_model"):
        model = getattr(model, part, model)
    return model


def network_of(files: ModelFiles, dtype: torch.dtype) -> nn.Module:
    """Loads the network with all its weights.

    Raises:
        UserError: a weight is missing, unexpected or of another shape, or a file is unreadable.
    """
    from transformers.utils import logging

    kind, own = _class(files.config, files.folder)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports heads, which are left out, as weights left over
    try:
        with reading(files.weights, files.folder.name):
            model, found = kind.from_pretrained(
                files.folder,
                config=own,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # so that they are listed in `found`
                output_loading_info=True,
                **_without_pooler(kind),
            )
    finally:
        logging.set_verbosity(level)
    reader = _reader(model)
    _check(files, model, reader, found)
    return reader


def _check(files: ModelFiles, model: nn.Module, reader: nn.Module, found: Any) -> None:
    """Checks what transformers reports: it fills in what is missing at random."""
    place = next(name for name, part in model.named_modules() if part is reader)
    ours = {f"{place}.{name}".lstrip(".") for name in reader.state_dict()}
    parts = {name.partition(".")[0] for name, _ in reader.named_parameters()}
    begins = tuple(f"{place}.{part}.".lstrip(".") for part in parts)
    wrong = {
        "lacks": sorted(ours & set(found["missing_keys"])),
        "has in another shape": sorted(ours & {of[0] for of in found["mismatched_keys"]}),
        "has besides": sorted(k for k in _plain(files, model, found) if k.startswith(begins)),
    }
    for what, names in wrong.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{files.folder}: the file of weights {what} {names[0]}{more}: give the "
                f"{CONFIG} and the weights that belong together"
            )


def _plain(files: ModelFiles, model: nn.Module, found: Any) -> set[str]:
    """Unexpected names, without the prefix that models with heads give to their base."""
    prefix = f"{type(model).base_model_prefix}."
    return {name.removeprefix(prefix) for name in found["unexpected_keys"]}


def tokenizer_of(file: Path, most: int) -> Any:
    """Loads a tokenizer.

    Args:
        most: number of tokens that the network knows.

    Raises:
        UserError: the file is damaged, or belongs to a model with more tokens.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no error of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged ({reason}): fetch it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    greatest = max([*tokenizer.get_vocab().values(), 0])
    if greatest >= most:
        raise UserError(
            f"{file} has a token {greatest}, but the model has {most} tokens: put the "
            f"{TOKENIZER} of this model there"
        )
    return tokenizer


def splits_of(tokenizer: Any) -> Splits:
    """The special tokens that a tokenizer puts around a caption."""
    whole, own = (tokenizer.encode("a", add_special_tokens=of).ids for of in (True, False))
    starts = range(len(whole) - len(own) + 1)
    start = next((i for i in starts if whole[i : i + len(own)] == own), 0)
    return Splits(whole[:start], whole[start + len(own) :])
