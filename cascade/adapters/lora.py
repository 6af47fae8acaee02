"""LoRA: low-rank changes of a stage's linear layers and convolutions (2106.09685).

The files are peft's, `adapter_config.json` and `adapter_model.safetensors`: peft loads adapters
that were trained here, and Cascade loads adapters that peft trained for the same network. peft's
layers are not used. They change a layer's output, whereas the U-Nets also read the weight of a
convolution directly (`convolve_enlarged`). These change the weight itself, as merging does.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade.adapters.adapter import CHANGED, base_hash, check_base, read
from cascade.encoders.weights import read_json
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of all names in peft's files
_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Options of peft's that make of the two matrices another change than their product.
_OTHERS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"),
    *("modules_to_save", "layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
)


class Change(nn.Module):
    """W + scale B A, of a linear layer, or of a convolution flattened to a matrix."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        out, *rest = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(rank, *rest))
        self.lora_B = nn.Parameter(weight.new_zeros(out, rank, *(1 for _ in rest[1:])))
        self.scale = scale
        nn.init.kaiming_uniform_(self.lora_A, math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + product(self.lora_A, self.lora_B, self.scale)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale B A, in the shape of the weight."""
    return scale * (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


class LoRA:
    """A change of low rank to each linear layer and convolution; it starts as zero.

    Args:
        rank: of each change.
        alpha: a change is scaled by alpha / rank; None: by 1.
        parts: of the stage that are changed, such as `net` and `conditioner`.

    Raises:
        UserError: the rank is less than 1.
    """

    def __init__(self, rank: int = 8, alpha: float | None = None, parts: Sequence[str] = ("net",)):
        if rank < 1:
            raise UserError(f"adapter.rank={rank}: give 1 or more")
        self.rank, self.parts = rank, tuple(parts)
        self.alpha = float(rank if alpha is None else alpha)

    def attached(self, stage: nn.Module) -> "LoRA":
        """Makes the weights of the parts parametrized. UserError if they have no such layer."""
        within = tuple(f"{part}." for part in self.parts)
        layers = [layer for name, layer in stage.named_modules() if name.startswith(within)]
        layers = [layer for layer in layers if _fits(layer)]
        if not layers:
            raise UserError(
                f"adapter.parts={list(self.parts)}: no linear layer or convolution there"
            )
        for layer in layers:
            change = Change(layer.weight, self.rank, self.alpha / self.rank)
            parametrize.register_parametrization(layer, "weight", change)
        return self

    def export(self, stage: nn.Module, state: Mapping[str, Tensor], run: Path) -> None:
        """Writes peft's two files; the weights name the network that they change."""
        tensors = {
            f"{_PREFIX}{name.replace(f'{CHANGED}0', '')}.weight": value
            for name, value in state.items()
            if f"{CHANGED}0." in name
        }
        names = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "bias": "none"}
        text = json.dumps({**config, "target_modules": names}, indent=2)
        about = {"format": "pt", "base": base_hash(state)}
        write_text(run / CONFIG, f"{text}\n")
        write_atomically(run / WEIGHTS, lambda path: save_file(tensors, path, about))


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1


def changes(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter adds to weights of a stage, by their names.

    Args:
        folder: of peft's two files.
        state: of the stage.

    Raises:
        UserError: it cannot be read, is no plain LoRA, or belongs to another network.
    """
    tensors, about = read(folder / WEIGHTS)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no {CONFIG}, which peft writes: give the whole folder")
    config = read_json(folder / CONFIG)
    wrong = [f"{name}={config[name]}" for name in _OTHERS if config.get(name)]
    wrong += [f"{k}={config[k]}" for k, v in _PLAIN.items() if config.get(k, v) != v]
    if wrong:
        raise UserError(f"{folder}: {wrong[0]}: give a LoRA without further options")
    check_base(folder, about, state)
    tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    found = {}
    for name, a in tensors.items():
        layer, _, which = name.rpartition(".lora_")
        if which == "B.weight" and f"{layer}.lora_A.weight" in tensors:
            continue
        b, own = tensors.get(f"{layer}.lora_B.weight"), state.get(f"{layer}.weight")
        if which != "A.weight" or b is None:
            raise UserError(
                f"{folder}: {name} is no part of a LoRA: give the folder that peft wrote"
            )
        if own is None:
            raise UserError(f"{folder} changes {layer}, which this network lacks: give its own")
        if (len(b), *a.shape[1:]) != own.shape or b.shape[1] != len(a):
            raise UserError(
                f"{folder} changes {layer} by {tuple(b.shape)} times {tuple(a.shape)}, which does "
                f"not fit {tuple(own.shape)}: give the adapter of this network"
            )
        found[f"{layer}.weight"] = product(a.to(own), b.to(own), _scale(config, layer, len(a)))
    return found


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What peft multiplies the product by: alpha / rank, or alpha / rank^1/2 (rsLoRA)."""
    alphas = config.get("alpha_pattern") or {}
    own = [alpha for name, alpha in alphas.items() if f".{layer}".endswith(f".{name}")]
    alpha = own[0] if own else config.get("lora_alpha", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def fuse(stage: nn.Module, adapters: Sequence[tuple[Path, float]]) -> None:
    """Adds the changes of adapters, each times its weight, to the weights of a stage.

    Raises:
        UserError: as `changes` does; then nothing has changed.
    """
    state = stage.state_dict()
    found = [(weight, changes(folder, state)) for folder, weight in adapters]
    for weight, some in found:
        for name, change in some.items():
            state[name] += weight * change
