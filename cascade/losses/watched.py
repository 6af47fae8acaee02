"""A network that remembers its last call, from which further losses are computed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Call(NamedTuple):
    """The input, the noise level and the output F of a network, and the outputs of some blocks."""

    x: Float[Tensor, "b *d"]
    logsnr: Float[Tensor, " b"]
    output: Float[Tensor, "b *e"]
    states: Mapping[nn.Module, Tensor]


class Watched:
    """Calls a network, and keeps the last `call`.

    Args:
        net: the network.
        blocks: of it, whose outputs are kept as well. They are watched during calls alone: what a
            backward pass recomputes is not kept.
    """

    def __init__(self, net: Any, blocks: Iterable[nn.Module]):
        self.net, self.blocks = net, tuple(blocks)
        self.call: Call | None = None

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Any) -> Tensor:
        states: dict[nn.Module, Tensor] = {}

        def keep(block: nn.Module, given: Any, output: Tensor) -> None:
            states[block] = output

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            output = self.net(x, logsnr, cond)
        finally:
            for hook in hooks:
                hook.remove()
        self.call = Call(x, logsnr, output, states)
        return output
