"""Solvers against reference steps, and on Gaussian data N(0, 0.5^2), whose solution is known."""

import math
from functools import partial

import pytest
import torch

from cascade.config.compose import built, composed
from cascade.diffusion.gaussian import Denoised
from cascade.diffusion.noise import alpha_sigma, cosine, cosine_table, linear_table
from cascade.diffusion.posterior import step
from cascade.diffusion.solvers import ancestral, ddim, ddim_inversion, dpmpp_2m, heun
from cascade.diffusion.spacing import karras
from tests.exact import VECTORS, f64

TABLES = {"cosine": cosine_table, "linear": linear_table}
STD = 0.5  # of the data
CHURN = partial(heun, s_churn=40.0, s_min=0.05, s_max=50.0)  # EDM's, for ImageNet


def close(actual, expected, tolerance=1e-10):
    expected = f64(expected).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def levels(name: str, *indices: int) -> torch.Tensor:
    return TABLES[name]((f64(indices) + 1) / 1000)


def best(x, logsnr) -> Denoised:
    """The exact denoiser, E[x0 | x_t]."""
    alpha, sigma = alpha_sigma(logsnr)
    return Denoised(alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x)


def best_with_variance(x, logsnr) -> Denoised:
    alpha, sigma = alpha_sigma(logsnr)
    var = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
    return Denoised(best(x, logsnr).x0, var.expand_as(x).to(x))


def spread(logsnr) -> torch.Tensor:
    """Standard deviation of x_t."""
    alpha, sigma = alpha_sigma(logsnr)
    return (alpha**2 * STD**2 + sigma**2).sqrt()


def says_eps(eps_hat):
    def denoise(x, logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        return Denoised((x - sigma * eps_hat) / alpha)

    return denoise


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step(name, eta):
    expected = VECTORS["samplers"][name]
    z, eps_hat = f64(VECTORS["samplers"]["z"]), f64(VECTORS["inputs"]["eps_hat"])
    solvers = [partial(ddim, eta=eta)] + [ancestral] * (eta == 1)
    for solver in solvers:
        x_t = f64(expected["x_t"])[None]
        out = solver(says_eps(eps_hat), x_t, levels(name, 499, 249), lambda shape: z[None])
        close(out[0], expected[f"eta_{eta}"]["x_prev"])


@pytest.mark.parametrize("name", TABLES)
def test_ddim_inversion_step(name):
    expected = VECTORS["samplers"][name]["inversion_249_to_499"]
    denoise = says_eps(f64(VECTORS["inputs"]["eps_hat"]))
    logsnrs = levels(name, 499, 249)
    x_t = ddim_inversion(denoise, f64(expected["x_s"])[None], logsnrs)
    close(x_t[0], expected["x_t"])
    close(ddim(denoise, x_t, logsnrs)[0], expected["x_s"])


@pytest.mark.parametrize("name", TABLES)
def test_dpmpp_2m_step(name):
    expected = VECTORS["samplers"][name]["dpmpp_2m_749_499_to_249"]
    x_t = f64(VECTORS["samplers"][name]["x_t"])
    answers = [f64(expected["D_prev(749)"]), f64(expected["D_cur(499)"])]
    logsnrs = levels(name, 749, 499, 249)
    # The first step must land on x_t: start from the x that it comes from.
    (alpha, sigma), (_, sigma_749) = alpha_sigma(logsnrs[1]), alpha_sigma(logsnrs[0])
    decay = (logsnrs[0] / 2 - logsnrs[1] / 2).exp()
    start = (x_t - alpha * (1 - decay) * answers[0]) * sigma_749 / sigma
    calls = iter(answers)
    out = dpmpp_2m(lambda x, logsnr: Denoised(next(calls)[None]), start[None], logsnrs)
    close(out[0], expected["x_249_midpoint"])
    out = dpmpp_2m(lambda x, logsnr: Denoised(answers[1][None]), x_t[None], logsnrs[1:])
    close(out[0], expected["x_249_order1_equals_ddim"])


@pytest.mark.parametrize("n", [10, 20, 50, 250])
def test_reference_errors_on_gaussian_data(n):
    expected = VECTORS["gaussian_ode_convergence"]
    logsnrs = cosine_table((torch.linspace(990, 9, n + 1).double().round() + 1) / 1000)
    x = torch.ones(1, 1, dtype=torch.float64)
    close(x * spread(logsnrs[-1]) / spread(logsnrs[0]), expected["exact_x_end"])
    close(ddim(best, x, logsnrs), expected[f"N{n}"]["ddim"])
    close(dpmpp_2m(best, x, logsnrs), expected[f"N{n}"]["dpmpp_2m_first_step_order1"])


@pytest.mark.parametrize("n", [8, 18, 32, 64])
def test_heun_is_edms(n):
    expected = VECTORS["edm"]["heun_gaussian_data"]
    logsnrs = karras(cosine, n)
    x = alpha_sigma(logsnrs[0])[0] * f64([[expected["x_init"]]])
    close(heun(best, x, logsnrs), expected[f"N{n}"])


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(solver, order):
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for n in (128, 256):
        logsnrs = cosine(torch.linspace(0.99, 0.01, n + 1, dtype=torch.float64))
        exact = spread(logsnrs[-1]) / spread(logsnrs[0])
        errors.append((solver(best, x, logsnrs) - exact).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_a_share_of_the_correction_lies_between_ddim_and_second_order():
    logsnrs = karras(cosine, 6)
    x = spread(logsnrs[0])[None]
    none, half, whole = (dpmpp_2m(best, x, logsnrs, share=share) for share in (0.0, 0.5, 1.0))
    close(none, ddim(best, x, logsnrs))
    assert (none - STD).abs() > (half - STD).abs() > (whole - STD).abs()


def test_the_six_steps_of_few_are_nearer_to_the_data_than_ddims():
    sampler = built(composed("sampler", ["sampler=few"]).sampler)
    logsnrs = sampler.spacing(cosine, sampler.steps)
    x = spread(logsnrs[0])[None]
    few, plain = (solver(best, x, logsnrs, None) for solver in (sampler.solver, ddim))
    assert (few - STD).abs() < 0.6 * (plain - STD).abs()


def test_inversion_leads_back_up_to_first_order():
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for n in (100, 200):
        logsnrs = cosine(torch.linspace(0.99, 0.01, n + 1, dtype=torch.float64))
        back = ddim(best, ddim_inversion(best, x, logsnrs), logsnrs)
        errors.append((back - x).abs().item())
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def law(solver, denoise, logsnrs) -> torch.Tensor:
    """Variance of what the solver draws, exactly: every draw is a coordinate of its own."""
    n = len(logsnrs)
    draws = iter(torch.eye(n, dtype=torch.float64)[1:])
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, 0] = spread(logsnrs[0])
    return solver(denoise, x, logsnrs, lambda shape: next(draws)[None]).square().sum()


@pytest.mark.parametrize("solver", [ancestral, partial(ddim, eta=1.0), partial(ddim, eta=0.5)])
def test_law_of_stochastic_solvers_converges_to_the_datas(solver):
    def error(n):
        logsnrs = cosine(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        return (law(solver, best, logsnrs) - spread(logsnrs[-1]) ** 2).abs().item()

    assert error(800) < 0.003
    assert math.log2(error(400) / error(800)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_ancestral_with_the_true_variance_has_the_true_law_in_any_number_of_steps(n):
    logsnrs = cosine(torch.linspace(1, 0, n + 1, dtype=torch.float64))
    close(law(ancestral, best_with_variance, logsnrs), spread(logsnrs[-1]).item() ** 2)


def test_a_respaced_step_is_the_published_one():
    expected = VECTORS["respaced_cosine_499_to_249"]
    down = step(*levels("cosine", 499, 249))
    close(down.log_large.exp(), expected["beta_skip"])
    close(down.log_small.exp(), expected["posterior_variance"])
    close(down.of_x0, expected["mean_coef_x0"])
    close(down.of_xt, expected["mean_coef_xt"])


@pytest.mark.parametrize(("share", "key"), [(0.0, "fixed_small_logvar"), (1, "fixed_large_logvar")])
def test_ancestral_gives_a_learned_range_the_step_that_it_takes(share, key):
    expected = VECTORS["respaced_cosine_499_to_249"]
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    out = ancestral(
        lambda x, logsnr: Denoised(zero, range=share * one),
        zero,
        levels("cosine", 499, 249),
        lambda shape: one,
    )
    close((out**2).log(), expected[key])


def test_ancestral_widens_as_analytic_dpm_does():
    expected = VECTORS["respaced_cosine_499_to_249"]
    var = expected["analytic_dpm"]["cov_x0_clipped_0_1"]
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for x0_var, wanted in [(None, expected["posterior_variance"]),
                           (var * one, expected["analytic_dpm"]["sigma2"])]:  # fmt: skip
        out = ancestral(
            lambda x, logsnr, x0_var=x0_var: Denoised(zero, x0_var),
            zero,
            levels("cosine", 499, 249),
            lambda shape: one,
        )
        close(out**2, wanted)


@pytest.mark.parametrize("solver", [ancestral, ddim, partial(ddim, eta=1.0), heun, dpmpp_2m])
def test_last_step_to_clean_is_the_last_x0_hat(solver):
    said = []

    def denoise(x, logsnr):
        said.append(best_with_variance(x, logsnr))
        return said[-1]

    start = -20.0 if solver is heun else -math.inf
    logsnrs = f64([start, -5, -1, 0.5, 3, math.inf])
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    out = solver(denoise, x, logsnrs, torch.randn)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    torch.testing.assert_close(out, said[-1].x0, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", [ancestral, ddim, partial(ddim, eta=1.0), heun, CHURN, dpmpp_2m])
def test_float32_follows_float64(solver):
    logsnrs = karras(cosine, 50)
    draws = torch.randn(60, 64, 3, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for dtype in (torch.float32, torch.float64):
        stream = iter(draws[1:].to(dtype))
        ends.append(
            solver(best, draws[0].to(dtype), logsnrs, lambda shape, stream=stream: next(stream))
        )
    torch.testing.assert_close(ends[0].double(), ends[1], rtol=0, atol=2e-5)


def test_law_of_a_churned_heun_converges_to_the_datas_at_second_order():
    def error(n):
        logsnrs = karras(cosine, n)
        return (law(CHURN, best, logsnrs) - spread(logsnrs[-1]) ** 2).abs().item()

    assert error(400) < 5e-4
    assert math.log2(error(200) / error(400)) == pytest.approx(2, abs=0.1)


def test_churn_raises_the_noise_before_a_step():
    """Over 4 steps 0.8 of it: x is brought to 1.2 sigma, and the network is told that."""
    seen = []

    def denoise(x, logsnr):
        seen.append(((-logsnr / 2).exp().item(), x / alpha_sigma(logsnr)[0]))
        return Denoised(torch.zeros_like(x))

    logsnrs = -2 * f64([8, 4, 2, 1, 0]).log()
    one = torch.ones(1, 1, dtype=torch.float64)
    x = 5 * alpha_sigma(logsnrs[0])[0] * one
    solver = partial(heun, s_churn=0.8, s_min=1.5, s_max=5.0, s_noise=1.1)
    solver(denoise, x, logsnrs, lambda shape: one)
    # Each step scales y in proportion to sigma, here, and ends at the level that was planned.
    y = 5 * one / 8 * 4
    raised = y + 1.1 * math.sqrt((1.2 * 4) ** 2 - 4**2)
    close(f64([sigma for sigma, _ in seen]), [8, 4, 4.8, 2, 2.4, 1, 1])
    close(seen[1][1], y.tolist())
    close(seen[2][1], raised.tolist())
    close(seen[3][1], (raised * 2 / 4.8).tolist())


def test_a_churn_is_bounded():
    """Of 1000 over 4 steps, sigma is raised by root 2 each."""
    seen = []

    def denoise(x, logsnr):
        seen.append((-logsnr / 2).exp())
        return Denoised(x)

    x = torch.ones(1, 1, dtype=torch.float64)
    partial(heun, s_churn=1e3)(denoise, x, -2 * f64([4, 2, 0]).log(), torch.randn)
    close(torch.stack(seen), [4 * 2**0.5, 2, 2 * 2**0.5])


def test_infinite_starts_are_refused_where_they_mean_nothing():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="finite"):
        heun(best, x, f64([-math.inf, 0, math.inf]))
    with pytest.raises(ValueError, match="finite"):
        ddim_inversion(best, x, f64([-3, 0, math.inf]))
