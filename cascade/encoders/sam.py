"""Sharpness-aware minimisation (SAM, 2010.01412, equations 2 and 3).

SAM takes the gradient at w + rho g / |g|, where g is the gradient at w. `torch.autograd.grad`
computes g without DDP and without touching the accumulated gradients. So each rank and micro-batch
climbs along its own gradient ("perturbations applied independently by the replicas", unCLIP,
appendix C), and only the gradient for the optimizer is averaged.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SAM:
    """Moves the weights to the worst loss nearby, and back after the backward pass.

    Args:
        rho: radius of the neighbourhood (unCLIP: 0.1).
    """

    def __init__(self, rho: float):
        self.rho = rho
        self._weights: list[tuple[nn.Parameter, Tensor]] = []

    def climb(self, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> None:
        """Sets w <- w + rho g / |g|, with g the gradient of `loss` and |g| over all parameters."""
        moved = [p for p in parameters if p.requires_grad]
        gradients = torch.autograd.grad(loss, moved)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        self._weights = [(p, p.detach().clone()) for p in moved]
        with torch.no_grad():
            for p, g in zip(moved, gradients):
                p.add_(g * (self.rho / (norm + 1e-12)))
        torch.clear_autocast_cache()  # it holds copies of the old weights

    @torch.no_grad()
    def descend(self) -> None:
        """Restores w exactly; the gradients remain those at the worse point."""
        for p, w in self._weights:
            p.copy_(w)
        self._weights = []
