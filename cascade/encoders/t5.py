"""The encoder half of a T5 in a directory of transformers' format: its files, network and tokens.

What is not a T5 with all its weights, or has tokens of another kind, is refused: transformers would
fill in random weights, or read another tokenizer as T5's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cascade.encoders.weights import NotHere, check_tensors, read_json, reading, tensors_of
from cascade.errors import UserError

_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor by two names
_UNUSED = ("decoder.", "lm_head.")
# Settings that the shapes of the weights do not reveal.
_CHOICES = (
    *("feed_forward_proj", "num_heads", "d_kv", "layer_norm_epsilon"),
    "relative_attention_max_distance",
)
_PROBES = (
    "a red square left of a large blue circle",
    "A photo of the Eiffel Tower at night, 35 mm f/1.8 (1/60 s) & ISO-400!",
    "  two   spaces\tand\na line ",
    "Crème brûlée, naïve Übermut; señor’s “jalapeño” — 50 % off…",
    "ﬁne ＦＵＬＬ ｗｉｄｔｈ ½ ² ①",
    "北京 Москва 🙂",
)


class T5Source(NamedTuple):
    """A directory in the format of transformers, and the weights in it."""

    directory: Path
    weights: list[Path]

    @property
    def choices(self) -> dict[str, Any]:
        """Everything besides the weights that the output depends on."""
        config = _config(self.directory)
        return {name: getattr(config, name) for name in _CHOICES}


def t5_source(path_or_name: str) -> T5Source:
    """Finds the T5 in a directory, or by name in the local Hugging Face cache.

    Raises:
        NotHere: files are missing.
        UserError: the model is of another kind.
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
        raise NotHere(f"{folder} is not a whole T5: put its {', '.join(missing)} there")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "t5":
        raise UserError(
            f"{folder / 'config.json'} has model_type {kind}, not t5, and is not read as a T5 (a "
            "UMT5, say, has positions in every block): choose a T5, such as google/t5-v1_1-xl, or "
            "read it with text=llm"
        )
    return T5Source(folder, weights)


def t5_width(path_or_name: str) -> int:
    """The width of a T5's states, without its weights.

    Raises:
        UserError: its config.json is missing or damaged.
    """
    file = _t5_directory(path_or_name) / "config.json"
    if not file.is_file():
        raise NotHere(f"{file.parent} is not a T5: put its config.json there")
    width = read_json(file).get("d_model")
    if not isinstance(width, int):
        raise UserError(f"{file} has no d_model, the width of a T5's states: fetch it again")
    return width


def _config(folder: Path) -> Any:
    from transformers import T5Config

    try:
        return T5Config.from_dict(read_json(folder / "config.json"))
    except UserError:
        raise
    except Exception as error:  # transformers raises errors of any kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / 'config.json'} is no T5's ({reason}): fetch it again"
        ) from error


def t5_parameters(path_or_name: str) -> int:
    """The number of an encoder's parameters. Raises UserError as `t5_width`."""
    from transformers import T5EncoderModel

    t5_width(path_or_name)
    with torch.device("meta"):
        network = T5EncoderModel(_config(_t5_directory(path_or_name)))
    return sum(p.numel() for p in network.parameters())


def check_t5(source: T5Source, name: str) -> None:
    """Checks that all weights are present and fit; of safetensors only the headers are read.

    Raises:
        UserError: a weight is missing, unexpected, of another shape, or unreadable.
    """
    from transformers import T5EncoderModel

    folder, weights = source
    with reading(weights, name):
        config = _config(folder)
        with torch.device("meta"):
            own = T5EncoderModel(config).state_dict()
        theirs = {k: v for k, v in tensors_of(weights).items() if not k.startswith(_UNUSED)}
        for one, other in (_TABLES, _TABLES[::-1]):
            if one in theirs:
                theirs.setdefault(other, theirs[one])
        check_tensors(own, theirs, ", ".join(map(str, weights)), name)


def t5_network(source: T5Source, name: str, dtype: torch.dtype) -> nn.Module:
    """Loads the encoder with all its weights. Raises UserError as `check_t5`."""
    from transformers import T5EncoderModel

    check_t5(source, name)
    folder, weights = source
    with reading(weights, name):
        return T5EncoderModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=weights[0].suffix == ".safetensors",  # the files that were hashed
            weights_only=True,
            dtype=dtype,
        )


def t5_tokenizer(folder: Path) -> Any:
    """Loads T5's tokenizer, and compares it with the files that it was built from.

    `T5Tokenizer` takes the vocabulary of a tokenizer.json and ignores the rest, such as
    lower-casing. (`AutoTokenizer` would offer to run the folder's code.)

    Raises:
        UserError: a file is damaged, or tokenizes in another way.
    """
    from transformers import T5Tokenizer

    files = [f for name in ("tokenizer.json", "spiece.model") if (f := folder / name).exists()]
    try:
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        ours = tokenizer(list(_PROBES)).input_ids
        by_file = {file: _ids(file) for file in files}
        width = read_json(folder / "config.json").get("vocab_size", len(tokenizer))
    except UserError:
        raise
    except Exception as error:  # the libraries raise errors of any kind
        names = " and ".join(map(str, files))
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{names} cannot be read as T5's tokenizer ({type(error).__name__}: {reason}): put the "
            "spiece.model of the T5 there"
        ) from error
    for file, theirs in by_file.items():
        for probe, own, other in zip(_PROBES, ours, theirs):
            if own != other:
                raise UserError(
                    f"{file} has other tokens than T5's tokenizer of {folder}: {probe!r} is "
                    f"{_begin(other)} by the file and {_begin(own)} by the other; keep the "
                    "spiece.model of the T5 alone there"
                )
    if len(files) > 1:
        _same_vocabulary(tokenizer, *files)
    most = max(tokenizer.pad_token_id, *map(max, ours))
    if most >= width:
        raise UserError(
            f"{folder} has a token {most}, but its config.json has {width} tokens: put the "
            "tokenizer of this T5 there"
        )
    return tokenizer


def _ids(file: Path) -> list[list[int]]:
    """Tokenizes the probes with the file itself."""
    if file.suffix == ".json":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return [tokenizer.encode(probe).ids for probe in _PROBES]
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    return [[*pieces.encode(probe), pieces.eos_id()] for probe in _PROBES]


def _same_vocabulary(tokenizer: Any, file: Path, pieces: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(pieces))
    for i in range(theirs.vocab_size()):
        own, other = tokenizer.convert_ids_to_tokens(i), theirs.id_to_piece(i)
        if own != other:
            raise UserError(
                f"{file} calls token {i} {own!r}, {pieces} calls it {other!r}: keep the one that "
                "belongs to the weights"
            )


def _begin(ids: Sequence[int]) -> str:
    return str(list(ids[:8]))[:-1] + (", ...]" if len(ids) > 8 else "]")


def _t5_directory(path_or_name: str) -> Path:
    folder = Path(path_or_name)
    return folder if folder.is_dir() else _cached_directory(path_or_name)


def _cached_directory(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise NotHere(
            f"{name} is neither a directory nor in the local Hugging Face cache: fetch its "
            "config.json, tokenizer and weights into a directory, and give that"
        ) from None
