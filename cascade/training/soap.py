"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (2409.11321), by pytorch-optimizer."""

from collections.abc import Iterable
from typing import Any

import torch

from cascade.errors import UserError


def soap(
    params: Iterable[Any],
    lr: float,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 0.0,
    every: int = 10,
) -> torch.optim.Optimizer:
    """The optimizer, for parameters or groups of them.

    A convolution has a basis for each of its dimensions. The first step only takes statistics.

    Args:
        lr, betas, weight_decay: as of Adam.
        every: steps between two updates of the bases.

    Raises:
        UserError: the library is not installed.
    """
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise UserError("optim=soap: run `pip install 'cascade-diffusion[soap]'` first") from None
    rate = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
    return SOAP(params, **rate, precondition_frequency=every)
