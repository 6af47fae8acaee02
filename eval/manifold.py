"""Fidelity and diversity apart: whose features lie among the neighbours of whose.

Every row of a set has a ball around it that reaches to its k-th nearest other row of the set.
Distances are computed in blocks, in float64: nothing of n x n is held, and rows may lie on disk.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from cascade.eval.kernels import blocks


def precision_recall(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 3
) -> dict[str, float]:
    """Share of generated rows in a ball of a real one, and the reverse.

    Balls are closed. (Kynkäänniemi et al. 2019, arXiv 1904.06991.) ValueError if a set has not more
    than k rows.
    """
    among_real, _ = _inside(fake, real, radii(real, k))
    among_fake, _ = _inside(real, fake, radii(fake, k))
    shares = [(count > 0).double().mean().item() for count in (among_real, among_fake)]
    return dict(zip(("precision", "recall"), shares))


def density_coverage(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5
) -> dict[str, float]:
    """How many real balls a generated row is in, over k, and the share of real balls with any.

    Balls are open, as in the authors' code: both are about 1 for sets that are alike. (Naeem et
    al. 2020, arXiv 2002.09797.) ValueError if a set has not more than k rows.
    """
    densities, covered = in_balls(fake, real, k)
    return {"density": densities.mean().item(), "coverage": covered.double().mean().item()}


def in_balls(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5
) -> tuple[Float64[Tensor, " n"], Bool[Tensor, " m"]]:
    """What `density_coverage` is the means of: of each generated row, and of each real one."""
    counts, covered = _inside(fake, real, radii(real, k), closed=False)
    return counts.double() / k, covered


def radii(x: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """The distance of each row to its k-th nearest other row."""
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
    queries: Float[Tensor, "n d"],
    centres: Float[Tensor, "m d"],
    radii: Float[Tensor, " m"],
    closed: bool = True,
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " m"]]:
    """In how many balls each query is, and which balls have any."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    found = torch.zeros(len(centres), dtype=torch.bool, device=queries.device)
    for i, rows in blocks(queries):
        for j, columns in blocks(centres):
            distances = torch.cdist(rows, columns)
            inside = distances <= radii[j] if closed else distances < radii[j]
            counts[i] += inside.sum(1)
            found[j] |= inside.any(0)
    return counts, found
