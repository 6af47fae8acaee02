"""95 % confidence intervals of measures over the generated pictures.

Distances are bootstrapped: generated pictures are resampled with replacement, and the reference
stays fixed. Resamples repeat pictures, which biases every distance upwards, so the percentiles are
shifted by the difference between the resamples' mean and the estimate.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cascade.draws import generator
from cascade.eval.metrics.distances import factor
from cascade.eval.metrics.kernels import Kernel, discrepancy

LARGE = 512
_Z = 1.959963984540054  # of a normal distribution, for 95 %
Interval = tuple[float, float]


def of_mean(values: Float[Tensor, " n"]) -> Interval:
    """The normal approximation for the mean of one value per picture, such as cosines."""
    values = values.double()
    half = _Z * values.std().item() / math.sqrt(len(values))
    return values.mean().item() - half, values.mean().item() + half


def of_share(share: float | int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share of n pictures.

    (p + z^2 / 2n +- z (p (1 - p) / n + z^2 / 4n^2)^(1/2)) / (1 + z^2 / n)

    It stays within [0, 1], and has a width at shares of 0 and 1.

    Raises:
        ValueError: the share is outside of [0, 1], or n is below 1.
    """
    if not 0 <= share <= 1 or n < 1:
        raise ValueError(f"{share} of {n} is no share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    r = z**2 / n
    half = math.sqrt(share * (1 - share) * r + r * r / 4)
    middle, scale = share + r / 2, 1 + r
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def of_kernel(
    kernel: Kernel,
    fake: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    unbiased: bool,
    draws: int,
) -> Interval:
    """The bootstrap interval of `kernels.discrepancy`: the KID, or the CMMD / 1000."""
    estimate = discrepancy(kernel, fake, real, unbiased).item()
    counts = _counts(len(fake), draws, seed=0).to(fake.device).double()
    return _percentiles(estimate, discrepancy(kernel, fake, real, unbiased, counts))


def of_inception_score(
    logits: Iterable[Float[Tensor, "_ c"]], n: int, draws: int, splits: int = 10
) -> Interval:
    """The bootstrap interval of `inception_score`; pictures are resampled within each split."""
    split = torch.arange(n) % splits
    sizes = split.bincount()
    weights = torch.ones(draws + 1, n, dtype=torch.float64)  # row 0: each once
    for i, size in enumerate(sizes.tolist()):
        weights[1:, split == i] = _counts(size, draws, seed=i).double()
    weights /= sizes[split]
    p, p_log_p, start = torch.zeros(()), torch.zeros(()), 0  # sums, as in `inception_score`
    for part in logits:
        now = slice(start, start := start + len(part))
        own = weights[:, now] * (split[now] == torch.arange(splits)[:, None])[:, None]
        log_p = part.double().log_softmax(1)
        p = p + own @ log_p.exp()
        p_log_p = p_log_p + own @ (log_p.exp() * log_p).sum(1)
    scores = (p_log_p - torch.special.xlogy(p, p).sum(-1)).exp().mean(0)
    return _percentiles(scores[0].item(), scores[1:])


def of_frechet(
    fake: Float[Tensor, "n d"],
    mean: Float64[Tensor, " d"],
    cov: Float64[Tensor, "d d"],
    draws: int = 200,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of the Fréchet distance of generated rows to a reference.

    A resample is a weight for each row. With the reference's covariance S1 = F F', tr (S1 S2)^(1/2)
    is the sum of the square roots of the eigenvalues of F' S2 F or, with fewer rows than
    dimensions, of the Gram matrix of the rows in these coordinates; each resample needs one
    eigendecomposition. In more than `LARGE` dimensions these are slow; if there are also many rows,
    the distance is linearised in the rows' weights (the infinitesimal jackknife), which then agrees
    with the bootstrap.
    """
    if fake.shape[1] > LARGE and len(fake) >= 4 * fake.shape[1]:
        estimate, moved = _first_order(fake.double(), mean.to(fake.device), cov)
        half = _Z * moved.std().item() / math.sqrt(len(moved))
        return estimate - half, estimate + half
    x = fake.double() - mean.to(fake.device)
    spread = x @ factor(cov).to(x.device)
    squares, trace = x.square().sum(1), cov.trace().item()
    few = len(spread) < spread.shape[1]
    gram = spread @ spread.T if few else None

    def distance(counts: Int64[Tensor, " n"]) -> Tensor:
        w, n = counts.to(x) / len(x), len(x) / (len(x) - 1)
        middle = w @ x
        total = n * (w @ squares - middle.square().sum())
        if few:
            row = gram @ w  # centre at the resample's mean, then weight both sides
            matrix = gram - row - row[:, None] + w @ row
            matrix *= torch.outer(w.sqrt(), w.sqrt())
        else:
            centre = w @ spread
            matrix = spread.T @ (w[:, None] * spread) - torch.outer(centre, centre)
        values = torch.linalg.eigvalsh(n * matrix).clamp(min=0)
        return middle.square().sum() + total + trace - 2 * values.sqrt().sum()

    once = torch.ones(len(x), dtype=torch.int64)
    drawn = torch.stack([distance(counts) for counts in _counts(len(x), draws, seed)])
    return _percentiles(distance(once).item(), drawn)


def _first_order(
    x: Float64[Tensor, "n d"], mean: Float64[Tensor, " d"], cov: Float64[Tensor, "d d"]
) -> tuple[float, Float64[Tensor, " n"]]:
    """The Fréchet distance, and its derivative by the weight of each row, up to a constant:

    2 (x - m2)' (m2 - m1) + (x - m2)' (1 - T) (x - m2), where T = F (F' S2 F)^(-1/2) F' is the
    optimal transport map between the Gaussians.
    """
    shift, f = x.mean(0) - mean, factor(cov).to(x.device)
    centred = x - x.mean(0)
    squares, spread = centred.square().sum(1), centred @ f
    values, vectors = torch.linalg.eigh(spread.T @ spread / (len(x) - 1))
    kept = values > 1e-12 * values[-1]
    turned = spread @ (vectors[:, kept] * values[kept].pow(-0.25))
    traces = squares.sum() / (len(x) - 1) + cov.trace().to(x.device)
    distance = shift.square().sum() + traces - 2 * values.clamp(min=0).sqrt().sum()
    return distance.item(), 2 * centred @ shift + squares - turned.square().sum(1)


def _counts(n: int, draws: int, seed: int) -> Int64[Tensor, "r n"]:
    """How often each of n pictures is drawn in each resample."""
    drawn = [generator(seed, "bootstrap", i).integers(n, size=n) for i in range(draws)]
    return torch.stack([torch.from_numpy(d).bincount(minlength=n) for d in drawn])


def _percentiles(estimate: float, drawn: Float[Tensor, " r"]) -> Interval:
    ends = torch.tensor([0.025, 0.975], dtype=drawn.dtype, device=drawn.device)
    low, high = (torch.quantile(drawn - drawn.mean(), ends) + estimate).tolist()
    return low, high
