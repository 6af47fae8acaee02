"""Muon: momentum whose update of each matrix is orthogonal, and AdamW for all else.

Along every direction in which a matrix's gradient points, the update is equally long, so that rare
directions, such as those that tell word orders apart, are learned as soon as frequent ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TABLE = 16  # rows per column from which a matrix is a table of embeddings
_LONG = 2  # columns per row from which products of Gram matrices take less time


class Muon(torch.optim.AdamW):
    """Muon (Jordan, 2024) for matrices and convolutions, scaled to AdamW's steps (2502.16982).

    A convolution is a matrix with one row per output channel. Vectors, and tables with many more
    rows than columns, whose rows are looked up rather than multiplied, take AdamW's step. (torch's
    own Muon refuses all but matrices, and steps alike: `tests/test_muon.py`.)

    Args:
        params: parameters, or groups of them.
        lr, weight_decay: of all parameters.
        momentum: of the matrices' gradients, with Nesterov's look-ahead.
        betas, eps, fused: of AdamW.
        convolutions: whether convolutions are matrices; otherwise they take AdamW's step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool | None = None,
        convolutions: bool = True,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self.momentum, self.dimensions = momentum, (2, 3, 4, 5) if convolutions else (2,)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after calling `closure`, if there is one; returns what it returns."""
        with torch.enable_grad():
            loss = closure() if closure else None
        gradients = {}
        for group in self.param_groups:
            for p in filter(self._is_matrix, group["params"]):
                if p.grad is not None:
                    gradients[p], p.grad = p.grad, None  # which AdamW therefore skips
            self._step_matrices(group, {p: gradients[p] for p in group["params"] if p in gradients})
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient
        return loss

    def _is_matrix(self, p: Tensor) -> bool:
        return p.ndim in self.dimensions and p.shape[0] < _TABLE * p[0].numel()

    def _step_matrices(self, group: dict[str, Any], gradients: dict[Tensor, Tensor]) -> None:
        shapes = defaultdict(list)
        for p, gradient in gradients.items():
            if p not in self.state:  # AdamW expects a step of every state that it loads
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            velocity = self.state[p]["momentum"]
            velocity.lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp(velocity, self.momentum).flatten(1)
            shapes[ahead.shape].append((p, ahead))
        for (rows, columns), some in shapes.items():
            updates = orthogonal(torch.stack([ahead for _, ahead in some]))
            size = 0.2 * max(rows, columns) ** 0.5  # the root mean square of AdamW's updates is 0.2
            for (p, _), update in zip(some, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * size)


def orthogonal(matrices: Float[Tensor, "k n m"]) -> Float[Tensor, "k n m"]:
    """Moves all singular values of each matrix to about 1 (0.7 to 1.2), keeping their vectors.

    Five steps of a quintic Newton-Schulz iteration, whose coefficients trade exactness for speed at
    small singular values. Each multiplies x by a polynomial of its Gram matrix. For a long matrix
    the polynomials are multiplied first: they and the Gram matrix commute, and are small.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if _LONG * x.shape[1] <= x.shape[2]:
        gram = x @ x.mT
        whole = p = _polynomial(gram)
        for _ in range(4):
            gram = p @ gram @ p
            p = _polynomial(gram)
            whole = p @ whole
        x = whole @ x
    else:
        for _ in range(5):
            x = _polynomial(x @ x.mT) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _polynomial(gram: Float[Tensor, "k n n"]) -> Float[Tensor, "k n n"]:
    p = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    p.diagonal(dim1=1, dim2=2).add_(3.4445)
    return p
