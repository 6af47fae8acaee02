"""Claims about precision, recall, density and coverage: definitions written out, and extremes."""

import pytest
import torch

from cascade.eval.metrics import kernels
from cascade.eval.metrics.manifold import in_balls, precision, radii


def rows(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def shares(fake, real, k=3, balls=5):
    densities, covered = in_balls(fake, real, balls)
    return {
        "precision": precision(fake, real, k),
        "recall": precision(real, fake, k),
        "density": densities.mean().item(),
        "coverage": covered.double().mean().item(),
    }


def naive(fake, real, k):
    """By loops over pairs."""

    def distance(a, b):
        return (a - b).square().sum().sqrt().item()

    def reach(x):
        return [sorted(distance(a, b) for b in x)[k] for a in x]  # its own distance is the first

    inside = [[distance(f, r) <= d for r, d in zip(real, reach(real))] for f in fake]
    reverse = [[distance(f, r) <= d for f, d in zip(fake, reach(fake))] for r in real]
    return {
        "precision": sum(map(any, inside)) / len(fake),
        "recall": sum(map(any, reverse)) / len(real),
        "density": sum(map(sum, inside)) / (k * len(fake)),
        "coverage": sum(map(any, zip(*inside))) / len(real),
    }


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_shares_are_those_of_the_definitions(monkeypatch, block, k):
    monkeypatch.setattr(kernels, "BLOCK", block)
    fake, real = rows(23, 3, 0, shift=0.6), rows(31, 3, 1)
    expected = naive(fake, real, k)
    assert all(0 < value < 1 for value in expected.values()) or k > 1
    assert shares(fake, real, k, k) == pytest.approx(expected, rel=1e-12)


def test_radii_are_those_of_a_line():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    torch.testing.assert_close(radii(x, 1), torch.tensor([1, 1, 2, 4]).double())
    torch.testing.assert_close(radii(x, 2), torch.tensor([3, 2, 3, 6]).double())


def test_sets_apart_share_nothing():
    fake, real = rows(20, 4, 0, shift=50.0), rows(20, 4, 1)
    found = shares(fake, real)
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_a_set_that_repeats_one_mode_is_precise_and_has_no_recall():
    real = torch.cat([rows(50, 4, 0), rows(50, 4, 1, shift=20.0)])
    fake = 0.3 * rows(100, 4, 2)
    found = shares(fake, real)
    assert found["precision"] > 0.95
    assert found["recall"] < 0.5
    assert found["density"] > 1.5
    assert found["coverage"] < 0.5


def test_sets_that_are_alike_have_density_and_coverage_near_one():
    """Naeem et al.: E[density] = 1, E[coverage] = 1 - prod (n - i) / (2 n - i) for i to k."""
    found = shares(rows(500, 4, 0), rows(500, 4, 1))
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)


def test_too_few_rows_have_no_neighbours():
    with pytest.raises(ValueError, match="give at least 4"):
        precision(rows(9, 2, 0), rows(3, 2, 1))
    assert len(radii(rows(4, 2, 0), 3)) == 4
