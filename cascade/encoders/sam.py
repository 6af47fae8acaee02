"""Sharpness-aware minimisation: which gradient is taken, not what an optimizer makes of it.

SAM (Foret et al., 2010.01412, equations 2 and 3) takes the gradient at w + rho g / |g|, where g is
that at w. With `torch.autograd.grad` g is no business of DDP and of the accumulated gradients: each
rank, and each micro-batch, climbs from its own samples ("perturbations applied independently by
the replicas", unCLIP, appendix C), and only what the optimizer is given is averaged.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SAM:
    """Moves weights to where a loss is worst nearby, and back behind the backward pass.

    Args:
        rho: radius of the neighbourhood (unCLIP: 0.1).
    """

    def __init__(self, rho: float):
        self.rho = rho
        self._weights: list[tuple[nn.Parameter, Tensor]] = []

    def climb(self, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> None:
        """w <- w + rho g / |g|; g is the gradient of `loss`, and |g| over all parameters."""
        moved = [p for p in parameters if p.requires_grad]
        gradients = torch.autograd.grad(loss, moved)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        self._weights = [(p, p.detach().clone()) for p in moved]
        with torch.no_grad():
            for p, g in zip(moved, gradients):
                p.add_(g * (self.rho / (norm + 1e-12)))
        torch.clear_autocast_cache()  # or autocast would go on with copies of the old weights

    @torch.no_grad()
    def descend(self) -> None:
        """Back to w, exactly; gradients stay those of the worse place."""
        for p, w in self._weights:
            p.copy_(w)
        self._weights = []
