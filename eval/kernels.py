"""Squared maximum mean discrepancies of two sets of features: KID and CMMD.

Kernels are summed in blocks, in float64: nothing of n x n is held, and rows may lie on disk. A set
may be weighted by how often each row was drawn, which is all that a bootstrap needs.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cascade.draws import generator

BLOCK = 1024
Kernel = Callable[[Float[Tensor, "m d"], Float[Tensor, "n d"]], Float[Tensor, "m n"]]


def cubic(x: Float[Tensor, "m d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """(x.y / d + 1)^3, the kernel of the KID."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Float[Tensor, "m d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """exp(-|x - y|^2 / (2 10^2)) - 1 of the rows at unit norm, the kernel of the CMMD.

    Without the 1, which cancels: such kernels are nearly constant, and a discrepancy is what is
    left of them.
    """
    x, y = normalize(x, dim=1), normalize(y, dim=1)
    return torch.expm1((x @ y.T - 1) / 10**2)


def discrepancy(
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    unbiased: bool,
    counts: Float[Tensor, "r n"] | None = None,
) -> Float[Tensor, " r"]:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y) (Gretton et al. 2012).

    Args:
        unbiased: leave pairs of a row with itself out of the first two means.
        counts: how often each row of x was drawn, in r draws of n rows (default: once, r = 1).
    """
    once = torch.ones(1, len(y), dtype=torch.float64, device=y.device)
    if counts is None:
        counts = torch.ones(1, len(x), dtype=torch.float64, device=x.device)
    own = _mean_within(kernel, x, counts, unbiased) + _mean_within(kernel, y, once, unbiased)
    across = torch.zeros(len(counts), dtype=torch.float64, device=x.device)
    for i, rows in blocks(x):
        for _, columns in blocks(y):
            across += counts[:, i] @ kernel(rows, columns).sum(1)
    return own - 2 * across / (len(x) * len(y))


def _mean_within(
    kernel: Kernel, x: Float[Tensor, "n d"], counts: Float[Tensor, "r n"], unbiased: bool
) -> Float[Tensor, " r"]:
    total, n = torch.zeros(len(counts), dtype=torch.float64, device=x.device), len(x)
    for i, rows in blocks(x):
        for j, columns in blocks(x):
            if i.start > j.start:  # the kernel is symmetric
                continue
            values = kernel(rows, columns)
            share = ((counts[:, i] @ values) * counts[:, j]).sum(1)
            total += share if i == j else 2 * share
            if i == j and unbiased:
                total -= counts[:, i] @ values.diagonal()
    return total / (n * (n - unbiased))


def blocks(x: Float[Tensor, "n d"]) -> Iterator[tuple[slice, Float[Tensor, "b d"]]]:
    """The rows by the thousand, in float64, and where they are."""
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, x[part].double()


def kid(
    fake: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401), which may be negative.

    `kid` is the unbiased estimate from all rows. `kid_subsets` is what others report: the mean over
    random subsets of `size` rows of each set (or as many as there are), with its standard
    deviation over subsets, `kid_subsets_std`.
    """
    whole = discrepancy(cubic, fake, real, unbiased=True).item()
    size, scores = min(size, len(fake), len(real)), []
    for n in range(subsets):
        draw = generator(seed, "kid", n)
        parts = [x[torch.from_numpy(draw.permutation(len(x))[:size])] for x in (fake, real)]
        scores.append(discrepancy(cubic, *parts, unbiased=True))
    mean, std = torch.cat(scores).mean().item(), torch.cat(scores).std(correction=0).item()
    return {"kid": whole, "kid_subsets": mean, "kid_subsets_std": std}


def cmmd(fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """CLIP maximum mean discrepancy, times 1000: biased, Gaussian kernel of width 10.

    (Jayasumana et al. 2024, arXiv 2401.09603: embeddings of CLIP ViT-L/14 at 336 px.) Rows are
    brought to unit norm.
    """
    return 1000 * discrepancy(gaussian, fake, real, unbiased=False).item()
