"""The weights of a CLIP, checked against the model that they are for."""

import torch
from torch import Tensor, nn

from cascade.encoders.published.files import state_in
from cascade.encoders.sources import CLIPSource
from cascade.encoders.weights import check_tensors, reading


def clip_state(source: CLIPSource, name: str, shapes: bool = False) -> dict[str, Tensor]:
    """The weights by open_clip's names. UserError if they do not fit the model.

    Args:
        shapes: whether to check only; then of safetensors nothing but the header is read.
    """
    import open_clip

    # open_clip.load_checkpoint would silently interpolate positions of another size.
    state = state_in(source.weights, name, shapes)
    with reading([source.weights], name):
        with torch.device("meta"):
            model: nn.Module = open_clip.CLIP(**source.model)
        state = open_clip.factory.convert_state_dict(model, state)
        if "logit_scale" in state:  # some write [1]
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        check_tensors(model.state_dict(), state, str(source.weights), name)
    return state
