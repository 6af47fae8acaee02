"""Fréchet distance, Inception score and cosine similarity, computed from features.

Features are rows [n, d] of any space in `features.py`. Everything is computed in float64.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.linalg.lapack import dpstrf
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

    (Heusel et al. 2017, arXiv 1706.08500, equation 6.) With S1 = F1 F1' and S2 = F2 F2', the trace
    of the root is the sum of the singular values of F1' F2. This avoids the square root of a
    non-symmetric matrix, and rank-deficient covariances need no offset.

    Raises:
        ValueError: a mean or a covariance is not finite.
    """
    mu1, cov1, mu2, cov2 = (x.double().cpu() for x in (mu1, cov1, mu2, cov2))
    if not all(x.isfinite().all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("features are not finite: look for damaged weights or pictures")
    cross = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def factor(cov: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """F with F F' = cov, from a pivoted Cholesky decomposition in float64; r is the rank of cov.

    It takes a ninth of the time of an eigendecomposition, and stops when the remainder is rounding
    error.
    """
    lower, pivots, rank, _ = dpstrf(cov.double().cpu().numpy(), lower=1)
    out = np.empty((len(lower), rank))
    out[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(out)


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and generated pictures, summed up in batches.

    Covariances are unbiased (ddof = 1). States are float64 sums, so any number of ranks gives the
    value of one.

    Args:
        dim: d of the features.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, dim: int):
        super().__init__()
        for side in ("real", "fake"):
            for name, shape in {"n": (), "sum": (dim,), "outer": (dim, dim)}.items():
                zeros = torch.zeros(shape, dtype=torch.float64)
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "b d"], real: bool) -> None:
        side, x = "real" if real else "fake", features.detach().double()
        for name, value in {"n": len(x), "sum": x.sum(0), "outer": x.T @ x}.items():
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Float[Tensor, ""]:
        """Return the distance, a float64 scalar.

        Raises:
            ValueError: a side has fewer than two pictures, or features are not finite.
        """
        if min(self.real_n, self.fake_n) < 2:
            raise ValueError("a Fréchet distance needs at least two pictures on each side")
        real = _moments(self.real_n, self.real_sum, self.real_outer)
        fake = _moments(self.fake_n, self.fake_sum, self.fake_outer)
        return torch.tensor(frechet(*real, *fake), dtype=torch.float64)


def _moments(
    n: Float[Tensor, ""], total: Float[Tensor, " d"], outer: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


def frechet_rows(
    fake: Float[Tensor, "n d"], real: Float[Tensor, "m d"], minimum: int | None = None
) -> float | None:
    """`FrechetDistance` of two sets of features.

    It is biased upwards for small samples; below about four rows per dimension the bias dominates.

    Args:
        minimum: fewest rows of a set (default 4 d, at least 2).

    Returns:
        The distance; None if a set has too few rows.
    """
    if min(len(fake), len(real)) < max(4 * fake.shape[1] if minimum is None else minimum, 2):
        return None
    metric = FrechetDistance(fake.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


class InceptionScore(Metric):
    """exp of the mean KL divergence of p(class | picture) from p(class), over splits.

    (Salimans et al. 2016, arXiv 1606.03498.) Picture i belongs to split i mod `splits`, and each
    split has its own p(class) and score. States are float64 sums, as in `FrechetDistance`.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, classes: int = 1008, splits: int = 10):
        super().__init__()
        for name, shape in {"n": (splits,), "p": (splits, classes), "p_log_p": (splits,)}.items():
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b c"], ids: Int64[Tensor, " b"]) -> None:
        """Add pictures.

        Args:
            logits: see `InceptionFeatures.logits`.
            ids: number of each picture, which decides its split.
        """
        log_p = logits.detach().double().log_softmax(1)
        p, split = log_p.exp(), ids.to(logits.device) % len(self.n)
        self.n.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.p.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, (p * log_p).sum(1))

    def compute(self) -> tuple[float, float]:
        """Return the mean and standard deviation (ddof = 0) of the splits' scores.

        Raises:
            ValueError: a split has no picture.
        """
        if not self.n.all():
            raise ValueError(f"a split of {len(self.n)} has no picture: give more, or fewer splits")
        mean = self.p / self.n[:, None]
        scores = (self.p_log_p / self.n - torch.special.xlogy(mean, mean).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def inception_score(
    logits: Iterable[Float[Tensor, "_ c"]], classes: int = 1008, splits: int = 10
) -> tuple[float, float]:
    """`InceptionScore` of all pictures in order, given their logits in parts."""
    metric, start = InceptionScore(classes, splits), 0
    for part in logits:
        metric.update(part, torch.arange(start, start := start + len(part)))
    return metric.compute()


def cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine similarity of each pair of rows, in float64; neither scaled nor clamped.

    This is the convention of Imagen and Karlo for the CLIP score (about 0.3 on photographs). Others
    report 100 times it, or Hessel's 2.5 max(cos, 0) (arXiv 2104.08718).
    """
    return (_unit(x) * _unit(y)).sum(1)


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return normalize(x.detach().double(), dim=-1)
