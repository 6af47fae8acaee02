"""Fidelity and diversity as separate numbers: precision, recall, density and coverage.

Each row has a ball that reaches to its k-th nearest neighbour in the same set. Distances are
computed in float64, block by block: no n x n matrix is held, and rows may be memory mapped.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from cascade.eval.metrics.kernels import blocks


def precision(fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 3) -> float:
    """Share of generated rows in the (closed) ball of a real one; recall with the sets swapped.

    (Kynkäänniemi et al. 2019, arXiv 1904.06991.) ValueError if a set has at most k rows.
    """
    counts, _ = _inside(fake, real, k, closed=True)
    return (counts > 0).double().mean().item()


def in_balls(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5
) -> tuple[Float64[Tensor, " n"], Bool[Tensor, " m"]]:
    """In how many real balls each generated row is, over k, and which real balls have any.

    The means are density and coverage (Naeem et al. 2020, arXiv 2002.09797), both about 1 for sets
    of the same distribution. Balls are open, as in the authors' code. ValueError if the real set
    has at most k rows.
    """
    counts, covered = _inside(fake, real, k, closed=False)
    return counts.double() / k, covered


def radii(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Distance of each row to its k-th nearest neighbour. ValueError for at most k rows."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} pictures have no {k} neighbours each: give at least {k + 1}")
    out = []
    for i, rows in blocks(x):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=x.device)
        for j, columns in blocks(x):
            distances = torch.cdist(rows, columns)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        out.append(nearest[:, -1])
    return torch.cat(out)


def _inside(
    queries: Float[Tensor, "n d"], centres: Float[Tensor, "m d"], k: int, closed: bool
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " m"]]:
    """In how many balls each query lies, and which balls contain a query."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    found = torch.zeros(len(centres), dtype=torch.bool, device=queries.device)
    reach = radii(centres, k)
    for i, rows in blocks(queries):
        for j, columns in blocks(centres):
            distances = torch.cdist(rows, columns)
            inside = distances <= reach[j] if closed else distances < reach[j]
            counts[i] += inside.sum(1)
            found[j] |= inside.any(0)
    return counts, found
