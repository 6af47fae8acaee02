"""How far generated pictures are from real ones, and from their captions, given their features.

Features are rows [b, d] of any named space (`eval.features`); everything is summed in float64.
Where sums are enough, metrics keep sums only; `TwoSamples` keeps rows under the ids of their
pictures. So N ranks reduce to the very numbers of one rank, in whatever order pictures came.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.linalg.lapack import dpstrf
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def frechet(
    mu1: Float[Tensor, " d"],
    cov1: Float[Tensor, "d d"],
    mu2: Float[Tensor, " d"],
    cov2: Float[Tensor, "d d"],
) -> float:
    """Squared Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.

    With S1 = F1 F1' and S2 = F2 F2' the last trace is the sum of the singular values of F1' F2: no
    root of a matrix that is not symmetric is taken, and a covariance of deficient rank needs no
    offset. (Heusel et al. 2017, arXiv 1706.08500, equation 6.) ValueError if anything is not
    finite.
    """
    mu1, cov1, mu2, cov2 = (x.double().cpu() for x in (mu1, cov1, mu2, cov2))
    if not all(x.isfinite().all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("features are not finite: look for damaged weights or pictures")
    cross = torch.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def factor(cov: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """F with F F' = cov and as many columns as its rank: Cholesky's, with pivots, in float64.

    It takes a ninth of an eigendecomposition, and ends where what is left is rounding.
    """
    lower, pivots, rank, _ = dpstrf(cov.double().cpu().numpy(), lower=1)
    out = np.empty((len(lower), rank))
    out[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(out)


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and of generated pictures.

    Covariances are unbiased (ddof = 1). The distance shrinks as pictures are added, and below about
    four per dimension it says more about their number than about the pictures: `compute` raises
    ValueError where a side has fewer than `minimum` (4 `dim` unless given; never fewer than 2).

    Args:
        dim: d of the features.
        reference: mean and covariance of the real pictures, in place of updates with them.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        dim: int,
        minimum: int | None = None,
        reference: tuple[Float[Tensor, " d"], Float[Tensor, "d d"]] | None = None,
    ):
        super().__init__()
        self.minimum = max(4 * dim if minimum is None else minimum, 2)
        self.reference = reference
        for side in ("real", "fake"):
            shapes = {"n": (), "sum": (dim,), "outer": (dim, dim)}
            for name, shape in shapes.items():
                zeros = torch.zeros(shape, dtype=torch.float64)
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "b d"], real: bool) -> None:
        """ValueError for real pictures beside a reference."""
        if real and self.reference is not None:
            raise ValueError("the reference is given: update with generated pictures only")
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
        counts = [self.fake_n] if self.reference else [self.real_n, self.fake_n]
        fewest = int(min(counts))
        if fewest < self.minimum:
            raise ValueError(
                f"{fewest} pictures are too few for a Fréchet distance in "
                f"{len(self.real_sum)} dimensions: give at least {self.minimum} a side"
            )
        real = self.reference or _moments(self.real_n, self.real_sum, self.real_outer)
        fake = _moments(self.fake_n, self.fake_sum, self.fake_outer)
        return torch.tensor(frechet(*real, *fake), dtype=torch.float64)


def _moments(
    n: Float[Tensor, ""], total: Float[Tensor, " d"], outer: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    mu = total / n
    return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)


class TwoSamples(Metric):
    """A measure of two sets of features that needs all their rows: KID, CMMD, recall, ...

    Rows are gathered from all ranks and sorted by the ids of their pictures before they are
    measured, so that neither ranks nor batches nor order change a bit of it.

    Args:
        dim: d of the features.
        measure: of the generated and the real rows ([n, d], [m, d], float64): `kernels.kid`,
            `kernels.cmmd`, `manifold.precision_recall`, `manifold.density_coverage`.
    """

    full_state_update = False

    def __init__(
        self, dim: int, measure: Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Any]
    ):
        super().__init__()
        self.dim, self.measure = dim, measure
        for side in ("real", "fake"):
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_ids", [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        """No list is ever empty: torchmetrics would send a float32 vector in the place of rows."""
        for rows, ids in ((self.real_rows, self.real_ids), (self.fake_rows, self.fake_ids)):
            rows.append(torch.empty(0, self.dim, dtype=torch.float64, device=self.device))
            ids.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def reset(self) -> None:
        super().reset()
        self._begin()

    def update(self, features: Float[Tensor, "b d"], ids: Int64[Tensor, " b"], real: bool) -> None:
        """Adds the features of the pictures with these ids, each id once a side."""
        rows, names = (self.real_rows, self.real_ids) if real else (self.fake_rows, self.fake_ids)
        rows.append(features.detach().double())
        names.append(ids.to(features.device))

    def compute(self) -> Any:
        """What `measure` gives. ValueError if a picture was counted twice, or none."""
        fake = _in_order(self.fake_rows, self.fake_ids, "generated")
        return self.measure(fake, _in_order(self.real_rows, self.real_ids, "real"))


def _in_order(
    rows: list[Tensor] | Tensor, ids: list[Tensor] | Tensor, what: str
) -> Float[Tensor, "n d"]:
    rows, (ids, order) = dim_zero_cat(rows), dim_zero_cat(ids).sort()
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} {what} pictures are too few: give at least 2")
    if len(twice := ids[1:][ids.diff() == 0]):
        raise ValueError(f"the {what} picture {int(twice[0])} was counted twice")
    return rows[order]


class InceptionScore(Metric):
    """exp of the mean KL divergence of p(class | picture) from p(class), over splits.

    (Salimans et al. 2016, arXiv 1606.03498.) Picture i is in split i mod `splits`, whose score has
    a p(class) of its own. `compute` gives the mean of the scores and their standard deviation
    (ddof = 0), as is usual; ValueError if a split has no picture.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, classes: int = 1008, splits: int = 10):
        super().__init__()
        shapes = {"n": (splits,), "p": (splits, classes), "p_log_p": (splits,)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b c"], ids: Int64[Tensor, " b"]) -> None:
        """Logits as `InceptionFeatures.logits` gives them, and the ids of their pictures."""
        log_p = logits.detach().double().log_softmax(1)
        p, split = log_p.exp(), ids.to(logits.device) % len(self.n)
        self.n.index_add_(0, split, torch.ones_like(p[:, 0]))
        self.p.index_add_(0, split, p)
        self.p_log_p.index_add_(0, split, (p * log_p).sum(1))

    def compute(self) -> dict[str, float]:
        if not self.n.all():
            raise ValueError(f"a split of {len(self.n)} has no picture: give more, or fewer splits")
        mean = self.p / self.n[:, None]
        scores = (self.p_log_p / self.n - torch.special.xlogy(mean, mean).sum(1)).exp()
        std = scores.std(correction=0).item()
        return {"inception_score": scores.mean().item(), "inception_score_std": std}


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
        self.total += cosines(image_embeddings, text_embeddings).sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all pairs, a float64 scalar."""
        return self.total / self.n


def cosines(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Of each pair of rows, in float64."""
    return (_unit(x) * _unit(y)).sum(1)


def _unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return normalize(x.detach().double(), dim=-1)
