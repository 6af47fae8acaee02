"""How far generated pictures are from real ones, and from their captions, given their features.

Features are rows [b, d] of any named space (`eval.features`); everything is summed in float64.
Metrics keep sums only, so that N ranks reduce to the very numbers of one rank.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric


def frechet(
    mu1: Float[Tensor, " d"],
    cov1: Float[Tensor, "d d"],
    mu2: Float[Tensor, " d"],
    cov2: Float[Tensor, "d d"],
) -> float:
    """Squared Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.

    The last trace is the sum of the singular values of S1^(1/2) S2^(1/2): no root of a matrix that
    is not symmetric is taken, and a covariance of deficient rank needs no offset. (Heusel et al.
    2017, arXiv 1706.08500, equation 6.)
    """
    mu1, cov1, mu2, cov2 = (x.double() for x in (mu1, cov1, mu2, cov2))
    cross = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(cov: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and of generated pictures.

    Covariances are unbiased (ddof = 1). The distance shrinks as pictures are added, and below about
    four per dimension it says more about their number than about the pictures: `compute` raises
    ValueError where a side has fewer than `minimum` (4 `dim` unless given).
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, dim: int, minimum: int | None = None):
        super().__init__()
        self.minimum = 4 * dim if minimum is None else minimum
        for side in ("real", "fake"):
            shapes = {"n": (), "sum": (dim,), "outer": (dim, dim)}
            for name, shape in shapes.items():
                zeros = torch.zeros(shape, dtype=torch.float64)
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "b d"], real: bool) -> None:
        x = features.detach().double()
        if real:
            self.real_n += len(x)
            self.real_sum += x.sum(0)
            self.real_outer += x.T @ x
        else:
            self.fake_n += len(x)
            self.fake_sum += x.sum(0)
            self.fake_outer += x.T @ x

    def compute(self) -> Float[Tensor, ""]:
        """The distance, a float64 scalar."""
        fewest = int(min(self.real_n, self.fake_n))
        if fewest < max(self.minimum, 2):
            raise ValueError(
                f"{fewest} pictures are too few for a Fréchet distance in "
                f"{len(self.real_sum)} dimensions: give at least {max(self.minimum, 2)} a side"
            )
        real = _moments(self.real_n, self.real_sum, self.real_outer)
        fake = _moments(self.fake_n, self.fake_sum, self.fake_outer)
        return torch.tensor(frechet(*real, *fake), dtype=torch.float64)


def _moments(
    n: Float[Tensor, ""], total: Float[Tensor, " d"], outer: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


class CLIPScore(Metric):
    """Mean cosine of picture and caption embeddings, as it is: neither scaled nor clamped.

    This is Imagen's and Karlo's convention (about 0.3 on photographs); others report 100 times it,
    or Hessel's 2.5 max(cos, 0) (arXiv 2104.08718).
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ("n", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, image_embeddings: Float[Tensor, "b d"], text_embeddings: Float[Tensor, "b d"]
    ) -> None:
        self.n += len(image_embeddings)
        self.total += (_unit(image_embeddings) * _unit(text_embeddings)).sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all pairs, a float64 scalar."""
        return self.total / self.n


def retrieval_at_1(
    queries: Float[Tensor, "n d"],
    gallery: Float[Tensor, "n d"],
    same: Bool[Tensor, "n n"] | None = None,
) -> float:
    """Share of queries whose nearest gallery row, by cosine, is their own or one equivalent to it.

    `same[i, j]` says that gallery row j is as good an answer to query i as row i (equal captions);
    rows are always the same as themselves. Chance is 1 / n.
    """
    nearest = (_unit(queries) @ _unit(gallery).T).argmax(dim=1)
    rows = torch.arange(len(queries), device=queries.device)
    right = nearest == rows
    if same is not None:
        right |= same[rows, nearest]
    return right.double().mean().item()


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return normalize(x.detach().double(), dim=-1)
