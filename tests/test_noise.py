"""Schedules, predictions and weights against reference numbers and identities."""

import json
import math
from pathlib import Path

import pytest
import torch

from cascade.diffusion import noise, prediction
from cascade.diffusion.noise import alpha_sigma
from cascade.diffusion.weighting import clipped_v, min_snr

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
PREDICTIONS = [prediction.eps, prediction.x0, prediction.v, prediction.flow]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, f64(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_table_is_iddpms(name):
    expected = VECTORS["schedules"][name]
    u = (f64(VECTORS["schedules"]["index"]) + 1) / 1000
    logsnr = getattr(noise, f"{name}_table")(u)
    close(logsnr, expected["log_snr"])
    alpha, sigma = alpha_sigma(logsnr)
    close(alpha, expected["sqrt_alpha_bar"])
    close(sigma, expected["sqrt_one_minus_alpha_bar"])


@pytest.mark.parametrize("table", [noise.linear_table, noise.cosine_table])
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


def test_lognormal_is_edms_density():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log_sigma = -noise.lognormal(u) / 2 + math.log(0.5)
    close(log_sigma.mean(), -1.2, 1e-6)
    close(log_sigma.std(), 1.2, 1e-3)
    ends = noise.lognormal(f64([0, 1]))
    assert ends.tolist() == [math.inf, -math.inf]


def test_karras_is_edms_spacing():
    levels = (-noise.karras(8) / 2).exp()
    close(levels, VECTORS["edm"]["karras_N8"])
    levels = (-noise.karras(18) / 2).exp()
    close(levels[[0, 1, 2, -4, -3, -2]], VECTORS["edm"]["karras_N18_first3_last3"])
    assert levels[-1] == 0


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
        close(c_skip * x_t + c_out * eps_hat, expected["x0_hat_from_eps_hat"])
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
