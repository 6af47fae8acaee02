"""Reads the weights of a CLIP from any file that they are published in, by open_clip's names."""

from pathlib import Path

from torch import Tensor

from cascade.encoders.published import hugging_face
from cascade.encoders.published.archive import is_archive, read_archive
from cascade.encoders.weights import reading, tensors_of

# Entries of archives that are no weights: OpenAI's sizes, and the causal mask.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def state_in(file: Path, whose: str, shapes: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, without those that are no weights.

    Args:
        file: safetensors, a file of torch, or a TorchScript archive, with the names of open_clip,
            OpenAI or transformers.
        whose: the CLIP, for messages.
        shapes: whether shapes and dtypes suffice; then no data of safetensors is read.

    Raises:
        UserError: the file cannot be read, or would run code.
    """
    with reading([file], whose):
        if is_archive(file):
            state = read_archive(file).tensors
        elif shapes and file.suffix == ".safetensors":
            state = tensors_of([file])
        else:
            import open_clip

            state = open_clip.factory.load_state_dict(str(file), weights_only=True)
        if hugging_face.is_state(state):
            state = hugging_face.renamed(state)
        return {k: v for k, v in state.items() if k.rpartition(".")[2] not in _NO_WEIGHTS}
