"""Schedules, predictions and weights against reference numbers and identities."""

import math
from functools import partial

import pytest
import torch

from cascade.diffusion import noise, prediction
from cascade.diffusion.noise import alpha_sigma
from cascade.diffusion.posterior import ladder, step
from cascade.diffusion.weighting import clipped_v, min_snr
from tests.exact import VECTORS, f64

PREDICTIONS = [prediction.eps, prediction.x0, prediction.v, prediction.flow]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, f64(expected), rtol=tolerance, atol=tolerance)


TABLES = {
    "linear": noise.linear_table,
    "cosine": noise.cosine_table,
    "scaled_linear_sd": noise.scaled_linear_table,
}
INDEX = VECTORS["schedules"]["index"]


def levels(schedule, index=None, steps=1000):
    index = torch.arange(steps) if index is None else torch.tensor(index)
    return schedule((index.double() + 1) / steps)


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_published_one(name):
    expected, logsnr = VECTORS["schedules"][name], levels(TABLES[name])
    alpha, sigma = alpha_sigma(logsnr)
    beta = 1 - (alpha[1:] / alpha[:-1]) ** 2
    close(beta.sum() + sigma[0] ** 2, expected["sum_betas"])
    close((alpha**2).sum(), expected["sum_alpha_bar"])
    close(logsnr[INDEX], expected["log_snr"])
    close(alpha[INDEX], expected["sqrt_alpha_bar"])
    close(alpha[INDEX] ** 2, expected["alpha_bar"])
    close(sigma[INDEX], expected["sqrt_one_minus_alpha_bar"])
    close((-logsnr[INDEX] / 2).exp(), expected["sigma_ve"])


@pytest.mark.parametrize("name", TABLES)
def test_steps_of_a_table_have_the_published_posterior(name):
    expected = VECTORS["schedules"][name]
    _, down = ladder(TABLES[name], 1000)
    close(down.log_large[INDEX].exp(), expected["beta"])
    close(down.log_clipped[INDEX], expected["posterior_log_variance_clipped"])
    close(down.log_small[INDEX].exp(), expected["posterior_variance"])
    close(down.of_x0[INDEX], expected["posterior_mean_coef1_x0"])
    close(down.of_xt[INDEX], expected["posterior_mean_coef2_xt"])


@pytest.mark.parametrize("name", ["linear", "scaled_linear_sd"])
def test_zero_terminal_snr_is_the_papers(name):
    expected = VECTORS["zero_terminal_snr"][name]
    logsnr = levels(partial(noise.zero_terminal_snr, schedule=TABLES[name]))
    alpha, sigma = alpha_sigma(logsnr)
    beta = torch.cat([sigma[:1] ** 2, 1 - (alpha[1:] / alpha[:-1]) ** 2])
    close((alpha**2)[INDEX], expected["alpha_bar"])
    close(beta[INDEX], expected["beta"])
    close(levels(TABLES[name], [999]).exp()[0], expected["original_terminal_snr"])
    assert [logsnr[-1], alpha[-1], sigma[-1]] == [-math.inf, 0, 1]
    close(logsnr[0], levels(TABLES[name], [0])[0].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [*TABLES.values(), noise.zero_terminal_snr, noise.cosine])
def test_a_network_is_told_the_exact_index_of_a_table(schedule, dtype):
    table = noise.table(schedule, 1000).to(dtype)
    told = levels(schedule).clamp(-20, 20).to(dtype)  # as `Diffusion` tells a network
    index = noise.table_index(told, table)
    assert torch.equal(index, torch.arange(1000, dtype=dtype))
    between = noise.table_index((told[:-1] + told[1:]) / 2, table)
    torch.testing.assert_close(between, index[:-1] + 0.5, atol=2e-2, rtol=0)
    ends = noise.table_index(torch.tensor([30, -30], dtype=dtype), table)
    assert ends.tolist() == [0, 999]


def test_tables_are_real_though_they_are_first_asked_for_on_meta():
    with torch.device("meta"):
        noise.scaled_linear_table(torch.rand(1), steps=77)
        noise.zero_terminal_snr(torch.rand(1), schedule=noise.cosine_table, steps=77)
    schedule = partial(noise.zero_terminal_snr, schedule=noise.cosine_table, steps=77)
    assert noise.scaled_linear_table(f64(1), steps=77).isfinite()
    assert schedule(f64(1)) == -math.inf


@pytest.mark.parametrize("table", [*TABLES.values(), noise.zero_terminal_snr])
def test_uniform_u_meets_every_index_equally(table):
    u = (torch.arange(4000) + 0.5) / 4000
    levels, counts = table(u).unique(return_counts=True)
    assert len(levels) == 1000
    assert (counts == 4).all()


def test_table_is_right_in_float32_and_at_u_0():
    u = torch.arange(1001) / 1000
    exact = noise.cosine_table(torch.arange(1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(noise.cosine_table(u), exact.float())
    assert exact[0] == exact[1]


def test_cosine_is_iddpms_in_continuous_time():
    expected = VECTORS["schedules"]["cosine_continuous"]
    alpha, _ = alpha_sigma(noise.cosine(f64(expected["t"])))
    close(alpha**2, expected["alpha_bar_iddpm_s0.008_unnormalised"])
    close(alpha[0] ** 2, VECTORS["schedules"]["cosine_f0"])
    alpha, _ = alpha_sigma(noise.cosine(f64(expected["t"]), s=0.0))
    close(alpha**2, expected["alpha_bar_pure_cos2(pi t/2)"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_ends_exactly_in_noise(dtype):
    logsnr = noise.cosine(torch.tensor([0, 0.999999, 1], dtype=dtype))
    assert logsnr[0].item() == pytest.approx(8.7693, abs=1e-4)
    assert logsnr[1].isfinite()
    assert logsnr[2] == -math.inf
    assert alpha_sigma(logsnr[2]) == (0, 1)


def test_cosine_logsnr_is_simple_diffusions():
    expected = VECTORS["simple_diffusion"]
    u = f64(expected["t"])
    close(noise.cosine_logsnr(u), expected["logsnr_cosine_-15_15"])
    shifted = noise.cosine_logsnr(u, size=256)
    close(shifted, expected["logsnr_shift64_d256_paper(add shift)"])
    close(alpha_sigma(shifted)[0] ** 2, expected["alpha_bar_shift64_d256_paper"])
    for size in (256, 512, 1024):
        shift = noise.cosine_logsnr(u, size=size) - noise.cosine_logsnr(u)
        close(shift, [expected[f"shift_{size}_ref64"]] * len(u))


def test_other_readings_of_simple_diffusion_are_other_arguments():
    """Ours is the paper's; a copy of it shifts within the range, and one interpolates shifts."""
    expected = VECTORS["simple_diffusion"]
    u = f64(expected["t"])

    def kept(size):
        shift = 2 * math.log(64 / size)
        return noise.cosine_logsnr(u, size=size, low=-15 - shift, high=15 - shift)

    # 512 px pictures relative to 256 and to 32 px, not 64: as much as 128 and 1024 px to 64.
    plain = [noise.cosine_logsnr(u, size=size) for size in (128, 1024)]
    names = {name.split("(")[0]: values for name, values in expected.items()}
    close(kept(256), names["logsnr_shift64_d256_keep_range"])
    close((1 - u) * plain[0] + u * plain[1], names["logsnr_interp_d512_ref32_256_lucidrains"])
    opposite = (1 - u) * kept(1024) + u * kept(128)
    close(opposite, names["logsnr_interp_d512_ref32_256_k-diffusion"])


def test_lognormal_is_edms_density():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_sigma = -noise.lognormal(u) / 2 + math.log(0.5)
    close(log_sigma.mean(), -1.2, 1e-6)
    close(log_sigma.std(), 1.2, 1e-3)
    ends = noise.lognormal(f64([0, 1]))
    assert ends.tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "schedule",
    [noise.cosine, noise.cosine_table, noise.linear_table, noise.cosine_logsnr, noise.lognormal],
)
def test_noise_grows_with_u(schedule):
    assert (schedule(torch.linspace(0.001, 0.999, 200)).diff() < 0).all()


def test_conversions():
    for name in ("cosine", "linear"):
        expected = VECTORS["conversions"][f"{name}_t499"]
        x0, eps, eps_hat = (f64(VECTORS["inputs"][k]) for k in ("x0", "eps", "eps_hat"))
        logsnr = getattr(noise, f"{name}_table")(f64(0.5))
        alpha, sigma = alpha_sigma(logsnr)
        x_t = alpha * x0 + sigma * eps
        close(x_t, expected["x_t"])
        _, c_skip, c_out = prediction.eps(logsnr)
        x0_hat = c_skip * x_t + c_out * eps_hat
        close(x0_hat, expected["x0_hat_from_eps_hat"])
        down = step(logsnr, getattr(noise, f"{name}_table")(f64(0.499)))
        close(down.of_x0 * x0 + down.of_xt * x_t, expected["posterior_mean_true_x0"])
        close(down.of_x0 * x0_hat + down.of_xt * x_t, expected["posterior_mean_from_eps_hat"])
        close(down.log_small.exp(), expected["posterior_variance"])
        _, c_skip, c_out = prediction.v(logsnr)
        close(c_skip * x_t + c_out * f64(expected["v"]), x0.tolist())


def test_each_prediction_gives_back_x0_from_its_own_target():
    x0, eps = f64(0.7), f64(-1.3)
    logsnr = torch.linspace(-12, 12, 25, dtype=torch.float64)
    alpha, sigma = alpha_sigma(logsnr)
    targets = [eps, x0, alpha * eps - sigma * x0, eps - x0]
    for predict, target in zip(PREDICTIONS, targets):
        _, c_skip, c_out = predict(logsnr)
        x_t = alpha * x0 + sigma * eps
        close(c_skip * x_t + c_out * target, [0.7] * 25)


def test_v_is_edms_preconditioning_on_unit_variance_data():
    edm = {k: f64(v) for k, v in VECTORS["edm"].items() if isinstance(v, list)}
    scale = VECTORS["edm"]["sigma_data"]
    logsnr = -2 * (edm["sigma"] / scale).log()
    alpha, _ = alpha_sigma(logsnr)
    # EDM's y is scale x_t / alpha, its D is scale x0_hat.
    c_in, c_skip, c_out = prediction.v(logsnr)
    close(edm["c_in"] * scale / alpha, c_in.tolist())
    close(edm["c_skip"] / alpha, c_skip.tolist())
    close(edm["c_out"] / scale, (-c_out).tolist())
    close(edm["loss_weight"] * scale**2, (1 / c_out**2).tolist())


def test_min_snr_under_each_prediction():
    expected = VECTORS["min_snr_gamma5"]
    logsnr = f64(expected["snr"]).log()
    for predict in (prediction.eps, prediction.x0, prediction.v):
        on_f = min_snr(logsnr) * predict(logsnr).c_out ** 2
        close(on_f, expected[f"{predict.__name__}_pred"])
    assert min_snr(f64([-math.inf, math.inf])).tolist() == [0, 5]


def test_clipped_v_is_the_weight_of_v_where_it_is_small():
    logsnr = f64([-math.inf, -20, 0, 1, math.log(4), 5, math.inf])
    v_weight = 1 / prediction.v(logsnr).c_out ** 2
    close(clipped_v(logsnr), [min(w, 5.0) for w in v_weight.tolist()])
