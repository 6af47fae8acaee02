"""Claims about KID and CMMD: the papers' values, and the definitions written out."""

from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from cascade.eval.metrics import kernels
from cascade.eval.metrics.kernels import cmmd, cubic, discrepancy, gaussian, kid, kid_subsets


def rows(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def both(values, *names):
    return [torch.tensor(values[name], dtype=torch.float64) for name in names]


def test_kid_equals_the_vectors(vectors):
    a, b = both(vectors["kid"], "A", "B")
    assert kid(a, b) == pytest.approx(vectors["kid"]["kid_unbiased_A4_B5"], abs=1e-9)
    mean, std = kid_subsets(a, b[:4], subsets=3)  # subsets of all rows
    for found in (kid(a, b[:4]), mean):
        assert found == pytest.approx(vectors["kid"]["kid_unbiased_A4_B4"], abs=1e-9)
    assert std == pytest.approx(0, abs=1e-12)
    biased = discrepancy(cubic, a, b, unbiased=False).item()
    assert biased == pytest.approx(vectors["kid"]["biased_V_statistic_A4_B5"], abs=1e-9)


def test_cmmd_equals_the_vector(vectors):
    a, b = both(vectors["cmmd"], "A_normalised", "B_normalised")
    assert cmmd(a, b) == pytest.approx(vectors["cmmd"]["cmmd"], abs=1e-9)
    assert cmmd(3 * a, 0.1 * b) == pytest.approx(vectors["cmmd"]["cmmd"], abs=1e-9)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_blocks_add_up_to_the_whole(monkeypatch, block):
    monkeypatch.setattr(kernels, "BLOCK", block)
    x, y = rows(20, 5, 0), rows(17, 5, 1, shift=0.5)
    k = [(a @ b.T / 5 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    own = [(m.sum() - m.trace()) / (len(m) * (len(m) - 1)) for m in k[:2]]
    expected = (sum(own) - 2 * k[2].mean()).item()
    assert kid(x, y) == pytest.approx(expected, rel=1e-9)
    u, v = normalize(x), normalize(y)
    k = [torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean() for a, b in ((u, u), (v, v), (u, v))]
    expected = 1000 * (k[0] + k[1] - 2 * k[2]).item()
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_counts_are_repeated_rows(kernel, unbiased, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 4)
    x, y = rows(6, 3, 0), rows(9, 3, 1)
    counts = torch.tensor([[2, 0, 1, 3, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = discrepancy(kernel, x, y, unbiased, counts.double())
    expected = [discrepancy(kernel, x.repeat_interleave(c, 0), y, unbiased) for c in counts]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-12)


def test_unbiased_estimates_of_one_distribution_are_about_zero():
    """And biased ones are not; over 200 pairs of sets the mean is known to a few thousandths."""
    pairs = [(rows(20, 2, 2 * i), rows(20, 2, 2 * i + 1)) for i in range(200)]
    unbiased, biased = (
        torch.cat([discrepancy(cubic, *pair, unbiased) for pair in pairs])
        for unbiased in (True, False)
    )
    error = unbiased.std() / len(pairs) ** 0.5
    assert unbiased.mean().abs() < 3 * error
    assert biased.mean() > 10 * error


def test_subsets_are_the_same_each_time():
    x, y = rows(60, 4, 0), rows(70, 4, 1, shift=0.3)
    small = partial(kid_subsets, x, y, subsets=8, size=20)
    assert small() == small()
    assert small()[1] > 0
    mean, std = kid_subsets(x, y, subsets=400, size=20)
    assert mean == pytest.approx(kid(x, y), abs=4 * std / 400**0.5)


def test_rows_of_float32_are_measured_in_float64():
    x, y = rows(30, 4, 0), rows(30, 4, 1)
    small = [z.float() for z in (x, y)]
    large = [z.double() for z in small]
    assert kid(*small) == pytest.approx(kid(*large), rel=1e-12)
    assert cmmd(*small) == pytest.approx(cmmd(*large), rel=1e-12)
