"""Squared maximum mean discrepancies (MMD) of two sets of features: KID and CMMD.

Kernels are summed in float64, block by block: no n x n matrix is held, and rows may be memory
mapped. For the bootstrap, rows may be weighted by how often each was drawn.
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
    """exp(-|x - y|^2 / (2 10^2)) - 1 of rows scaled to unit norm, the kernel of the CMMD.

    At this width the exponential is nearly 1 everywhere. The 1 cancels in a discrepancy, and
    subtracting it first keeps the precision of the rest.
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
    """Squared MMD: mean k(x, x') + mean k(y, y') - 2 mean k(x, y) (Gretton et al. 2012).

    Args:
        unbiased: exclude pairs of a row with itself from the first two means.
        counts: how often each row of x was drawn in each of r resamples (default: once, r = 1).
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
    """Blocks of `BLOCK` rows in float64, each with its slice."""
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, x[part].double()


def kid(fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Kernel inception distance, the unbiased estimate from all rows; it may be negative.

    (Binkowski et al. 2018, arXiv 1801.01401.)
    """
    return discrepancy(cubic, fake, real, unbiased=True).item()


def kid_subsets(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID as papers report it: mean and standard deviation (ddof = 0) over random subsets.

    Args:
        size: rows of each set in a subset; of a smaller set, all.
    """
    size, scores = min(size, len(fake), len(real)), []
    for n in range(subsets):
        draw = generator(0, "kid", n)
        parts = [x[torch.from_numpy(draw.permutation(len(x))[:size])] for x in (fake, real)]
        scores.append(discrepancy(cubic, *parts, unbiased=True))
    found = torch.cat(scores)
    return found.mean().item(), found.std(correction=0).item()


def cmmd(fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """CLIP maximum mean discrepancy, times 1000: the biased estimate, Gaussian kernel of width 10.

    (Jayasumana et al. 2024, arXiv 2401.09603, with embeddings of CLIP ViT-L/14 at 336 px.) Rows are
    scaled to unit norm.
    """
    return 1000 * discrepancy(gaussian, fake, real, unbiased=False).item()
