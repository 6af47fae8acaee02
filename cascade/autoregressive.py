"""The autoregressive process: each token is predicted from those before it (unCLIP, section 2.2).

Tokens are int64 [b, t], each the number of one of v buckets; logits [b, v] are of the next token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cascade.diffusion.noise import Noise, uniform
from cascade.diffusion.sampling import Joinable, Watch
from cascade.errors import UserError

# Returns the logits [b, v] of the next token, given the last one [b], or None for the first.
Ask = Callable[[Int64[Tensor, " b"] | None], Float[Tensor, "b v"]]


@runtime_checkable
class TokenNet(Protocol):
    """A causal network: computes all logits at once, or one after another with a cache."""

    def __call__(self, tokens: Int64[Tensor, "b t"], cond: Any) -> Float[Tensor, "b t v"]: ...

    def prefill(self, cond: Any) -> tuple[Float[Tensor, "b v"], Any]: ...

    def step(self, token: Int64[Tensor, " b"], cache: Any) -> Float[Tensor, "b v"]: ...


class Autoregressive:
    """Cross-entropy of each token given the condition and the tokens before it: an `Objective`."""

    def loss(
        self, net: TokenNet, x0: Int64[Tensor, "b t"], cond: Any, noise: Noise
    ) -> Float[Tensor, " b"]:
        """The loss of each sample, in nats per token. It draws no noise."""
        logits = net(x0, cond)
        return F.cross_entropy(logits.transpose(1, 2), x0, reduction="none").mean(1)


@dataclass(frozen=True)
class TokenSampler:
    """Draws tokens from a trained network, one after another.

    The first token, the dot product of text and image embedding, is drawn from the top half of its
    distribution (unCLIP, section 2.2). We take this to be the upper half, by mass, of the network's
    prediction for the given caption. The top half over all training samples would require values
    that many captions never have, since dot products differ between captions.

    Args:
        scale: guidance scale, applied to the logits of all tokens; 1 is no guidance and costs one
            branch.
        temperature: divides the guided logits.
        percentile: the lower part of the dot product's distribution, which is never drawn. unCLIP
            tried 0.5, 0.7, 0.85 and 0.95, and found 0.5 best.
        steps: greatest number of tokens to draw. Later components keep their mean, which lies in
            the middle bucket. None: all.

    Raises:
        UserError: a number out of range.
    """

    scale: float = 1.0
    temperature: float = 1.0
    percentile: float = 0.5
    steps: int | None = None

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise UserError(f"a sampler of {self.steps} steps: it needs at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: it must be above 0")
        if not 0 <= self.percentile < 1:
            raise UserError(f"percentile={self.percentile}: from 0 to less than 1, 0.5 is the half")

    @torch.no_grad()
    def __call__(
        self,
        process: Autoregressive,
        net: TokenNet,
        shape: tuple[int, ...],
        cond: Joinable,
        weaker: tuple[TokenNet, Joinable] | None,
        noise: Noise,
        progress: Watch | None = None,
    ) -> Int64[Tensor, "b t"]:
        """Draws tokens of this shape [b, t].

        Args:
            weaker: the branch that guidance extrapolates away from; None: no guidance.
            noise: called once, for one number per token.
            progress: called after each token with (tokens done, total tokens, tokens so far).
        """
        steps = min(self.steps or shape[1], shape[1])
        u = uniform(noise, shape)
        u[:, 0] = self.percentile + (1 - self.percentile) * u[:, 0]
        ask = following(net, cond)
        if weaker is not None and self.scale != 1:
            ask = guided(net, cond, weaker, self.scale)
        # Half precision rounds differently at each batch size, which would change drawn tokens.
        with torch.autocast(u.device.type, enabled=False):
            tokens = torch.zeros(shape, dtype=torch.int64, device=u.device)
            for i in range(steps):
                logits = ask(tokens[:, i - 1] if i > 0 else None)
                tokens[:, i] = drawn(logits / self.temperature, u[:, i])
                if i == 0:
                    tokens[:, 1:] = logits.shape[1] // 2
                if progress:
                    progress(i + 1, steps, tokens)
        return tokens


def following(net: TokenNet, cond: Joinable) -> Ask:
    """The next-token logits of one network, with its cache."""
    cache = None

    def ask(last: Int64[Tensor, " b"] | None) -> Float[Tensor, "b v"]:
        nonlocal cache
        if last is not None:
            return net.step(last, cache)
        logits, cache = net.prefill(cond)
        return logits

    return ask


def guided(net: TokenNet, cond: Joinable, weaker: tuple[TokenNet, Joinable], scale: float) -> Ask:
    """Guided logits, weaker + scale (own - weaker), from one doubled batch or from two networks."""
    other, other_cond = weaker
    same = other is net
    own, less = following(net, cond.cat(other_cond) if same else cond), following(other, other_cond)

    def ask(last: Int64[Tensor, " b"] | None) -> Float[Tensor, "b v"]:
        if same:
            strong, weak = own(None if last is None else last.repeat(2)).chunk(2)
        else:
            strong, weak = own(last), less(last)
        return weak + scale * (strong - weak)

    return ask


def drawn(logits: Float[Tensor, "b v"], u: Float64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """Inverts the CDF: the bucket of each row in which it passes u, in (0, 1).

    With u uniform in (p, 1), this draws from the highest 1 - p of the distribution's mass; a bucket
    that p divides counts with its part above p.
    """
    cdf = logits.double().softmax(1).cumsum(1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
