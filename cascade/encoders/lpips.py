"""LPIPS, a perceptual distance between pictures, with networks from local files (1801.03924).

Features of a network that was trained to classify, in torchvision's format, are normalised over the
channels at five layers. Their squared differences are weighted by channel, as people judged, and
averaged over positions. The weights of the channels are part of torchmetrics.
"""

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cascade.encoders.identity import Former, identity
from cascade.encoders.weights import NotHere, check_tensors, reading, tensors_in, weights_hash

# Of torchvision's layers, those whose outputs are compared; and the file of torchmetrics.
_LAYERS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
_CHANNELS = {"vgg16": "vgg.pth", "alexnet": "alex.pth"}
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]


class LPIPS:
    """The distance, loaded on first use; gradients flow to the pictures alone.

    Args:
        file: the network's weights, as torchvision publishes them (`vgg16-397923af.pth`).
        network: whose weights they are.

    Raises (on first use):
        UserError: there is no such file, or it does not hold the weights of this network.
    """

    device = torch.device("cpu")

    def __init__(self, file: str, network: Literal["vgg16", "alexnet"] = "vgg16"):
        self.file, self.network = Path(file), network
        self.name = file

    @cached_property
    def hash(self) -> str:
        """Identifies the weights and the network."""
        if not self.file.exists():
            raise NotHere(f"{self.file} is not there: give a file of {self.network}'s weights")
        return identity(weights_hash([self.file]), {"network": self.network})

    @property
    def former(self) -> Former:
        return Former("")

    def to(self, device: torch.device | str) -> "LPIPS":
        """Sets the device that it computes on."""
        self.device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self.device)
        return self

    def __call__(
        self, one: Float[Tensor, "b 3 h w"], other: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        """The distance of each pair of pictures in [-1, 1], in float32."""
        with torch.autocast(self.device.type, enabled=False):
            return self._distance(torch.cat([one, other]).float())

    def _distance(self, pairs: Float[Tensor, "c 3 h w"]) -> Float[Tensor, " b"]:
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (_MEAN, _STD))
        x, total = (pairs - mean) / std, pairs.new_zeros(len(pairs) // 2)
        for i, layer in enumerate(self._model):
            x = layer(x)
            if i in _LAYERS[self.network]:
                weights = self._channels[_LAYERS[self.network].index(i)].to(self.device)
                a, b = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()).chunk(2)
                total = total + F.conv2d((a - b).square(), weights).mean((1, 2, 3))
        return total

    @cached_property
    def _model(self) -> nn.Sequential:
        from torchvision import models

        _ = self.hash  # or there is no file
        with torch.device("meta"):
            net: Any = getattr(models, self.network)().features
        with reading([self.file], self.network):
            found = tensors_in(self.file)
            own = {k: v for k, v in found.items() if k.startswith("features.")}
            held = {k.removeprefix("features."): v for k, v in own.items()}
            check_tensors(net.state_dict(), held, str(self.file), self.network)
            net.load_state_dict(held, assign=True)
        for layer in net:
            layer.inplace = False
        net = net[: _LAYERS[self.network][-1] + 1]
        return net.eval().requires_grad_(False).to(self.device)

    @cached_property
    def _channels(self) -> list[Tensor]:
        root = Path(find_spec("torchmetrics").submodule_search_locations[0])
        file = root / "functional" / "image" / "lpips_models" / _CHANNELS[self.network]
        found = tensors_in(file)
        return [found[f"lin{i}.model.1.weight"] for i in range(5)]
