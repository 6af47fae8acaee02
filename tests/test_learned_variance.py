"""iDDPM's process and the variational bound: reference values, and Gaussian data."""

import math

import pytest
import torch

from cascade.diffusion import noise as schedules
from cascade.diffusion import prediction
from cascade.diffusion.gaussian import Denoised, Diffusion
from cascade.diffusion.learned_variance import LearnedVariance
from cascade.diffusion.likelihood import bound, discretized_nll, normal_kl, term
from cascade.diffusion.noise import alpha_sigma
from cascade.diffusion.posterior import Step, ladder, log_variance
from cascade.diffusion.sampling import DiffusionSampler
from cascade.diffusion.solvers import ancestral
from cascade.diffusion.weighting import min_snr
from cascade.errors import UserError
from tests.exact import VECTORS, f64

TABLES = {"cosine": schedules.cosine_table, "linear": schedules.linear_table}
PREDICTIONS = [prediction.eps, prediction.x0, prediction.v, prediction.flow]
SCHEDULES = [
    schedules.cosine,
    schedules.cosine_table,
    schedules.linear_table,
    schedules.zero_terminal_snr,
    schedules.cosine_logsnr,
    schedules.lognormal,
]
STD = 0.25  # of the data: within [-1, 1]


def close(actual, expected, tolerance=1e-10):
    expected = f64(expected).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def normal(seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=dtype)


def at_index(index: int, eps: torch.Tensor):
    """A source of noise that draws this level of 1000, then this eps."""
    draws = [torch.special.ndtri(f64([(index + 0.5) / 1000])), eps]
    return lambda shape: draws.pop(0)


def as_net(predict, x0_hat, v=0.0):
    """The network that, under this prediction, says x0_hat(x_t, alpha, sigma) and v."""

    def net(x, logsnr, cond):
        logsnr = logsnr[:, None]
        c_in, c_skip, c_out = predict(logsnr)
        F = (x0_hat(x / c_in, *alpha_sigma(logsnr)) - c_skip * x / c_in) / c_out
        return torch.cat([F, torch.full_like(F, v)], 1)

    return net


def best(x_t, alpha, sigma):
    """E[x0 | x_t]."""
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t


class Exact(Diffusion):
    """Gaussian data's own process: the denoiser knows mean and variance of x0."""

    def denoise(self, net, x_t, logsnr, cond):
        alpha, sigma = alpha_sigma(logsnr)
        var = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        return Denoised(best(x_t, alpha, sigma), var.expand_as(x_t))


def test_kl_of_two_gaussians():
    expected = VECTORS["vlb"]["normal_kl"]
    kl = normal_kl(*map(f64, expected["args"]))
    close(kl, expected["nats"])
    close(kl / math.log(2), expected["bits"])


@pytest.mark.parametrize("case", VECTORS["vlb"]["discretized_gaussian_ll"])
def test_likelihood_of_8_bit_values(case):
    x0, mean = f64([case["x"]]), f64([case["mean"]])
    nll = discretized_nll(x0, mean, 2 * f64(case["log_scale"]))
    close(-nll, case["exact_normal_cdf_nats"])
    assert (-nll).item() == pytest.approx(case["tanh_approx_nats"], abs=1e-3)


def test_8_bit_values_have_all_of_the_likelihood():
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_std in [(0.3, -1.0), (-0.99, -4.0), (1.5, 0.0)]:
        nll = discretized_nll(values, f64(mean).expand(256), f64(2 * log_std))
        close((-nll).exp().sum(), 1.0, 1e-6)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("v", [-1.0, 0.0, 0.5, 1.0])
def test_learned_range(name, v):
    expected = VECTORS["conversions"][f"{name}_t499"]["learned_range_logvar"][str(v)]
    _, down = ladder(TABLES[name], 1000)
    denoised = Denoised(f64([0.0]), range=f64([(v + 1) / 2]))
    for index in (499, 1, 0):
        step = Step(*(part[index] for part in down))
        close(log_variance(denoised, step), expected[f"t{index}"])


@pytest.mark.parametrize("name", TABLES)
def test_terms_of_the_bound(name):
    expected = VECTORS["vlb"][name]
    x0, eps, eps_hat = (f64([VECTORS["inputs"][key]]) for key in ("x0", "eps", "eps_hat"))
    levels, down = ladder(TABLES[name], 1000)
    (alpha, sigma), step = alpha_sigma(levels[499]), Step(*(part[499] for part in down))
    x0_hat = x0 + sigma / alpha * (eps - eps_hat)
    fixed = term(x0, Denoised(x0_hat), step, torch.tensor(False))
    close(fixed * math.log(2), expected["L_499_nats_fixed_small"])
    close((eps - eps_hat).square().mean(), expected["eps_mse"])
    close(fixed * math.log(2) / expected["eps_mse"], expected["eps_mse_weight_499"])
    middle = Denoised(x0_hat, range=torch.full_like(x0, 0.5))
    learned = term(x0, middle, step, torch.tensor(False))
    close(learned, expected["L_499_bits_learned_range_v0"])
    process = Diffusion(TABLES[name], prediction.x0)
    whole = bound(process, lambda x, *_: x, x0, None, normal(0), steps=1000)
    close(whole.prior, expected["prior_bpd_L_T"], 1e-12)
    assert whole.steps.shape == (1, 1000)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [1000, 250])
def test_hybrid_objective(name, steps):
    """The mean square of eps, and T / 1000 times L_t in bits."""
    expected = VECTORS["vlb"][name]
    x0, eps, eps_hat = (f64([VECTORS["inputs"][key]]) for key in ("x0", "eps", "eps_hat"))
    process = LearnedVariance(Diffusion(TABLES[name], prediction.eps))
    net = lambda x, *_: torch.cat([eps_hat, torch.zeros_like(x)], 1)  # noqa: E731
    loss = process.loss(net, x0, None, at_index(499, eps))
    close(loss - expected["eps_mse"], expected["L_499_bits_learned_range_v0"], 1e-12)
    shorter = LearnedVariance(process.mean, steps=steps).loss(net, x0, None, at_index(499, eps))
    if steps < 1000:
        levels, down = ladder(TABLES[name], steps)
        index = 499 * steps // 1000
        (alpha, sigma), step = alpha_sigma(levels[index]), Step(*(part[index] for part in down))
        denoised = Denoised(x0 + sigma / alpha * (eps - eps_hat), range=torch.full_like(x0, 0.5))
        bits = term(x0, denoised, step, torch.tensor(False))
        close(shorter, (expected["eps_mse"] + steps / 1000 * bits).tolist())


def test_the_first_level_is_the_likelihood_of_the_pictures():
    x0, eps = f64([[0.2, -1.0, 1.0]]), f64([[0.5, -0.3, 0.1]])
    process = LearnedVariance(Diffusion(schedules.cosine_table, prediction.x0))
    net = lambda x, *_: torch.cat([0 * x + 0.1, 0 * x + 0.5], 1)  # noqa: E731
    loss = process.loss(net, x0, None, at_index(0, eps))
    mean = torch.full_like(x0, 0.1)
    logvar = f64(0.25 * -10.734082532465003 + 0.75 * math.log(4.128422482196914e-05))
    nll = discretized_nll(x0, mean, logvar).mean() / math.log(2)
    close(loss, ((x0 - mean).square().mean() + nll).item())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bounds_part_is_the_same_under_every_prediction(schedule):
    x0, parts = normal(0)((64, 5)), []
    for predict in PREDICTIONS:
        mean = Diffusion(schedule, predict, min_snr)
        process = LearnedVariance(mean)
        net = as_net(predict, lambda x_t, alpha, sigma: 0.3 * x_t + sigma, v=0.2)
        loss = process.loss(net, x0, None, normal(1))
        # The same levels, those of the T steps, in the plain process.
        levels, _ = ladder(schedule, 1000)
        steps = Diffusion(lambda u, levels=levels: levels[(1000 * u).long()], predict, min_snr)
        first = lambda x, logsnr, cond, net=net: net(x, logsnr, cond).chunk(2, 1)[0]  # noqa: E731
        parts.append(loss - steps.loss(first, x0, None, normal(1)))
    for part in parts:
        assert (part > 0).all()
        torch.testing.assert_close(part, parts[1], rtol=1e-6, atol=1e-9)


def test_the_bound_teaches_the_variance_and_not_the_mean():
    mean, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)

    def net(x, logsnr, cond):
        return torch.cat([mean.expand_as(x), v.expand_as(x)], 1)

    x0 = normal(0)((32, 2))
    LearnedVariance(Diffusion()).loss(net, x0, None, normal(1)).sum().backward()
    hybrid, mean.grad = mean.grad, None
    levels, _ = ladder(schedules.cosine, 1000)
    plain = Diffusion(lambda u: levels[(1000 * u).long()])
    plain.loss(lambda x, *_: mean.expand_as(x), x0, None, normal(1)).sum().backward()
    torch.testing.assert_close(hybrid, mean.grad)
    assert v.grad.abs().min() > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_loss_and_gradient_are_finite_at_both_ends(schedule, predict):
    draws = [torch.tensor([-8.0, -6, -4, 4, 6, 8]), normal(0, torch.float32)((6, 3, 4, 4))]
    factor = torch.ones((), requires_grad=True)
    x0 = normal(1, torch.float32)((6, 3, 4, 4))
    process = LearnedVariance(Diffusion(schedule, predict))
    net = lambda x, *_: factor * torch.cat([x, x], 1)  # noqa: E731
    loss = process.loss(net, x0, None, lambda shape: draws.pop(0))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert factor.grad.isfinite()


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_denoise_gives_mean_and_range(predict):
    logsnr, x_t = f64(-1.5), normal(0)((4, 3))
    process = LearnedVariance(Diffusion(prediction=predict))
    out = process.denoise(as_net(predict, best, v=0.5), x_t, logsnr, None)
    torch.testing.assert_close(out.x0, best(x_t, *alpha_sigma(logsnr)))
    close(out.range, 0.75)
    assert out.var is None


@pytest.mark.parametrize("predict", [prediction.eps, prediction.v])
def test_sampling_draws_the_data(predict):
    class Nothing:
        def cat(self, other):
            return self

    process = LearnedVariance(Diffusion(schedules.cosine_table, predict))
    sampler = DiffusionSampler(steps=100, solver=ancestral)
    drawn = sampler(process, as_net(predict, best), (10, 2000), Nothing(), None, normal(0))
    assert drawn.std().item() == pytest.approx(STD, rel=0.03)


def test_a_network_of_half_the_channels_is_refused():
    process = LearnedVariance(Diffusion())
    with pytest.raises(UserError, match="6 output channels"):
        process.loss(lambda x, *_: x, torch.zeros(2, 3, 4, 4), None, normal(0))


def test_the_bound_of_the_exact_process_is_the_entropy_of_the_data():
    """With all variances true the bound is the likelihood itself, in any number of steps."""
    x0 = STD * normal(0)((4, 20_000))
    whole = bound(Exact(), lambda x, *_: x, x0, None, normal(1), steps=20)
    nll = 0.5 * ((x0 / STD) ** 2).mean() + math.log(STD * math.sqrt(2 * math.pi))
    expected = nll.item() / math.log(2) + math.log2(127.5)  # of bins 2 / 255 wide
    assert whole.total.mean().item() == pytest.approx(expected, abs=0.02)
    assert (whole.prior < 1e-6).all()


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_bound_of_a_fixed_variance_is_above_and_nears_it(predict):
    """But for the first step, where the clipped variance is not that of a small step."""
    x0 = STD * normal(0)((2, 5000))
    net = as_net(predict, best)
    first = lambda x, logsnr, cond: net(x, logsnr, cond).chunk(2, 1)[0]  # noqa: E731
    gaps = []
    for steps in (20, 200):
        exact, fixed = (
            bound(process, first, x0, None, normal(1), steps=steps)
            for process in (Exact(), Diffusion(schedules.cosine, predict))
        )
        assert (fixed.total > exact.total + 0.1).all()
        gaps.append((fixed.steps - exact.steps)[:, 1:].sum(1).mean().item())
    assert 0 < gaps[1] < gaps[0]


def test_a_learned_range_is_better_than_either_end():
    """On Gaussian data whose x0 has its own variance; iDDPM's figure 1."""
    x0 = STD * normal(0)((2, 5000))
    totals = [
        bound(
            LearnedVariance(Diffusion()), as_net(prediction.v, best, v), x0, None, normal(1), 20
        ).total.mean()
        for v in (-1.0, 0.0, 1.0)
    ]
    assert totals[1] < min(totals[0], totals[2])
