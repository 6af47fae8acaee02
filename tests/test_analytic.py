"""Analytic-DPM's variance, on Gaussian data, whose variance given x_t is known."""

import pytest
import torch

from cascade.diffusion.analytic import AnalyticVariance, x0_variance
from cascade.diffusion.gaussian import Denoised, Diffusion
from cascade.diffusion.noise import alpha_sigma, cosine, cosine_table, linear_table
from cascade.diffusion.prediction import eps, v, x0
from cascade.diffusion.sampling import DiffusionSampler
from cascade.diffusion.solvers import ancestral
from tests.exact import VECTORS

STD = 0.5  # of the data


class Nothing:
    """No condition."""

    def cat(self, other):
        return self


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def exact(predict):
    """The network whose x0_hat is E[x0 | x_t]."""

    def net(x, logsnr, cond):
        logsnr = logsnr.double()[:, None]
        (alpha, sigma), (c_in, c_skip, c_out) = alpha_sigma(logsnr), predict(logsnr)
        x_t = x / c_in
        x0_hat = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t
        return ((x0_hat - c_skip * x_t) / c_out).to(x)

    return net


def examples(batches: int, b: int = 8, d: int = 500):
    draw = normal(0)
    for _ in range(batches):
        yield STD * draw((b, d)), None, draw


def measured(schedule, predict):
    process = AnalyticVariance(Diffusion(schedule, predict))
    process.measure(exact(predict), examples(1000))
    return process


def test_a_step_has_the_published_variance():
    expected = VECTORS["respaced_cosine_499_to_249"]
    logsnrs = cosine_table(torch.tensor([0.5, 0.25], dtype=torch.float64))
    unexplained = torch.tensor(1 - expected["analytic_dpm"]["ms_eps"], dtype=torch.float64)
    var = x0_variance(unexplained, logsnrs[0])
    wanted = torch.tensor(expected["analytic_dpm"]["cov_x0_clipped_0_1"], dtype=torch.float64)
    torch.testing.assert_close(var, wanted, rtol=1e-10, atol=1e-10)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    out = ancestral(lambda x, t: Denoised(zero, var * one), zero, logsnrs, lambda shape: one)
    assert out.item() ** 2 == pytest.approx(expected["analytic_dpm"]["sigma2"], rel=1e-10)
    assert x0_variance(torch.tensor([2.0, -1.0]), torch.zeros(2)).tolist() == [1, 0]


@pytest.mark.parametrize("schedule", [cosine, linear_table])
@pytest.mark.parametrize("predict", [eps, x0, v])
def test_the_measured_variance_is_the_true_one(schedule, predict):
    """At all levels, measured or in between: 8000 numbers each, so 1.6 % is one deviation."""
    process = measured(schedule, predict)
    assert process.log_odds.isfinite().all()
    for u in torch.linspace(0.02, 0.99, 30, dtype=torch.float64):
        logsnr = schedule(u)
        alpha, sigma = alpha_sigma(logsnr)
        true = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        var = process.denoise(exact(predict), torch.zeros(1, 3), logsnr, None).var
        assert var.dtype == torch.float32
        torch.testing.assert_close(var, true.float().expand(1, 3), rtol=0.08, atol=0)


@pytest.mark.parametrize("steps", [2, 4, 16])
def test_few_steps_have_the_law_of_the_data(steps):
    """With the variance of q alone, 4 steps give a deviation of 0.44 in place of 0.5."""
    process, net = measured(cosine, x0), exact(x0)
    sampler = DiffusionSampler(steps=steps, solver=ancestral)
    drawn = sampler(process, net, (10, 4000), Nothing(), None, normal(1))
    plain = sampler(process.process, net, (10, 4000), Nothing(), None, normal(1))
    # The last step gives a mean: what is missing is the variance of x0 at the last level.
    alpha, sigma = alpha_sigma(sampler.logsnrs(process)[-2])
    last = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    assert (drawn.var() + last).item() == pytest.approx(STD**2, rel=0.03)
    assert (plain.var() + last).item() < 0.97 * STD**2


def test_before_it_is_measured_it_is_the_process_inside():
    process = AnalyticVariance(Diffusion(cosine, v))
    net, x = exact(v), torch.randn(4, 3)
    sampler = DiffusionSampler(steps=5, solver=ancestral)
    pair = [sampler(p, net, (4, 3), Nothing(), None, normal(2)) for p in (process, process.process)]
    torch.testing.assert_close(*pair)
    losses = [p.loss(net, x, None, normal(3)) for p in (process, process.process)]
    assert torch.equal(*losses)


def test_what_is_measured_is_saved():
    process = measured(cosine, v)
    assert list(process.state_dict()) == ["log_odds"]
    assert not list(process.parameters())
    other = AnalyticVariance(Diffusion(cosine, v))
    other.load_state_dict(process.state_dict())
    logsnr, x = torch.tensor(0.3, dtype=torch.float64), torch.zeros(1, 2)
    pair = [p.denoise(exact(v), x, logsnr, None).var for p in (process, other)]
    assert torch.equal(*pair)
