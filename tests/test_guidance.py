"""Guidance, thresholds, and the sampler that puts them together."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cascade.diffusion import guidance, prediction
from cascade.diffusion.gaussian import Denoised, Diffusion
from cascade.diffusion.noise import alpha_sigma, cosine, cosine_table, linear_table
from cascade.diffusion.sampling import DiffusionSampler
from cascade.diffusion.solvers import ancestral, ddim, dpmpp_2m, heun
from cascade.diffusion.spacing import even, karras
from cascade.draws import Draws
from cascade.errors import UserError
from tests.exact import VECTORS, f64

ZERO = torch.tensor(0.0, dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, f64(expected), rtol=tolerance, atol=tolerance)


def constant(x0, var=None):
    return lambda x, logsnr: Denoised(x0, var)


@dataclass(frozen=True)
class Label:
    """A condition: one number for each sample."""

    values: Tensor

    def cat(self, other: "Label") -> "Label":
        return Label(torch.cat([self.values, other.values]))


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.calls = []

    def forward(self, x, logsnr, cond):
        self.calls.append((x, logsnr, cond))
        told = (cond.values + logsnr / 10)[:, None, None, None]
        return self.last(torch.tanh(self.first(x) + told))


def label(*values: float) -> Label:
    return Label(torch.tensor(values))


@pytest.mark.parametrize("logsnr", [-4.0, 0.0, 4.0])
def test_guidance_in_x0_is_guidance_in_eps(logsnr):
    logsnr, cfg = f64(logsnr), VECTORS["cfg"]
    x_t = f64([[0.3, -1.0, 0.2, 2.0]])
    _, c_skip, c_out = prediction.eps(logsnr)
    branches = [Denoised(c_skip * x_t + c_out * f64(cfg[f"eps_{k}"])) for k in ("cond", "uncond")]
    guided = guidance.extrapolate(lambda x, logsnr: branches, cfg["scale_s"])(x_t, logsnr).x0
    alpha, sigma = alpha_sigma(logsnr)
    close(((x_t - alpha * guided) / sigma)[0], cfg["guided"])


def test_rescale():
    cfg = VECTORS["cfg"]
    branches = [Denoised(f64([cfg[f"eps_{k}"]])) for k in ("cond", "uncond")]
    x = torch.zeros(1, 4)
    out = guidance.rescale(lambda x, logsnr: branches, cfg["scale_s"], phi=0.7)(x, ZERO).x0
    close(out[0], cfg["rescale_phi_0.7"])


@pytest.mark.parametrize("name", list(VECTORS["interval_guidance_sigma_to_index"]))
@pytest.mark.parametrize(("table", "key"), [(cosine_table, "cosine"), (linear_table, "linear")])
def test_interval_guides_the_papers_indices(name, table, key):
    expected = VECTORS["interval_guidance_sigma_to_index"][name]
    x = torch.zeros(1, 1)
    denoise = guidance.interval(
        constant(x + 1), constant(x), expected["sigma_lo"], expected["sigma_hi"]
    )
    logsnrs = table((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    inside = [i for i, logsnr in enumerate(logsnrs) if denoise(x, logsnr).x0 == 1]
    assert [inside[0], inside[-1]] == expected[f"{key}_index_range_inclusive"]
    assert len(inside) == inside[-1] - inside[0] + 1


def test_static_threshold():
    expected = VECTORS["thresholding"]
    x0, var = f64([expected["x0_hat"]]), f64([[0.1]])
    out = guidance.static_threshold(constant(x0, var))(x0, ZERO)
    close(out.x0[0], expected["static"])
    assert out.var is var


@pytest.mark.parametrize("p", [0.5, 0.8, 0.9, 0.95, 0.995])
def test_dynamic_threshold(p):
    expected = VECTORS["thresholding"]
    x0 = f64(expected["x0_hat"])
    # The percentile is of each sample: another one in the batch must not matter.
    batch = torch.stack([x0, 0.01 * x0]).view(2, 1, 2, 5)
    for cap, key in [(None, "out_imagen"), (1.5, "out_if_c1.5")]:
        out = guidance.dynamic_threshold(constant(batch), p, cap)(batch, ZERO).x0
        close(out[0].flatten(), expected[f"p{p}"][key])
        torch.testing.assert_close(out[1], batch[1])


def test_dynamic_threshold_leaves_what_is_in_range():
    expected = VECTORS["thresholding"]["no_op_when_quantile_below_1"]
    x0 = f64([expected["x"]])
    out = guidance.dynamic_threshold(constant(x0))(x0, ZERO).x0
    close(out[0], expected["out_p0.995"])


def test_doubled_batch_is_two_calls_and_both_see_x_t():
    net, process = SmallNet(), Diffusion()
    x, logsnr = torch.randn(3, 3, 8, 8), torch.tensor(-1.0)
    cond, null = label(1, 2, 3), label(0, 0, 0)
    sampler = DiffusionSampler(steps=4, solver=ddim, scale=3.0)
    guided = sampler.denoiser(process, net, cond, (net, null))(x, logsnr).x0
    assert len(net.calls) == 1
    seen, _, told = net.calls[0]
    torch.testing.assert_close(seen, torch.cat([x, x]), rtol=0, atol=0)
    assert told.values.tolist() == [1, 2, 3, 0, 0, 0]
    given, free = (process.denoise(net, x, logsnr, c).x0 for c in (cond, null))
    torch.testing.assert_close(guided, free + 3 * (given - free), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "null"), [(1.0, label(0, 0)), (3.0, None)])
def test_no_guidance_costs_one_branch(scale, null):
    net = SmallNet()
    sampler = DiffusionSampler(steps=4, solver=ddim, scale=scale)
    sampler(Diffusion(), net, (2, 3, 8, 8), label(1, 2), null and (net, null), torch.randn)
    assert [len(x) for x, _, _ in net.calls] == [2, 2, 2, 2]


def test_outside_the_interval_one_branch_is_computed():
    net = SmallNet()
    sampler = DiffusionSampler(steps=20, solver=ddim, scale=3.0, interval=(0.28, 2.9))
    weaker = net, label(0, 0)
    sampler(Diffusion(), net, (2, 3, 8, 8), label(1, 2), weaker, torch.randn)
    doubled = [(-logsnr[0] / 2).exp().item() for x, logsnr, _ in net.calls if len(x) == 4]
    single = [(-logsnr[0] / 2).exp().item() for x, logsnr, _ in net.calls if len(x) == 2]
    assert doubled
    assert all(0.28 < sigma <= 2.9 for sigma in doubled)
    assert not any(0.28 < sigma <= 2.9 for sigma in single)


@pytest.mark.parametrize("solver", [ancestral, ddim, partial(ddim, eta=0.5), heun, dpmpp_2m])
def test_picture_does_not_depend_on_the_batch(solver):
    net, process = SmallNet(), Diffusion()
    sampler = DiffusionSampler(
        steps=6, solver=solver, scale=2.0, threshold=guidance.dynamic_threshold
    )

    def pictures(samples):
        b = len(samples)
        noise = Draws(0, "noise", samples)
        cond, null = Label(torch.tensor(samples).float()), Label(torch.zeros(b))
        return sampler(process, net, (b, 3, 8, 8), cond, (net, null), noise)

    together = pictures([1, 2, 3, 4])
    apart = torch.cat([pictures([4]), pictures([2, 1])])
    torch.testing.assert_close(together[[3, 1, 0]], apart, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("solver", [ancestral, ddim, heun, dpmpp_2m])
def test_sampler_draws_the_data(solver):
    """Data N(0.3, 0.5^2) and the exact denoiser, from pure noise to clean."""

    def net(x, logsnr, cond):
        alpha, sigma = (c[:, None] for c in alpha_sigma(logsnr))
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return 0.3 + gain * (x - alpha * 0.3)

    process, spacing = Diffusion(cosine, prediction.x0), karras if solver is heun else even
    sampler = DiffusionSampler(steps=200, solver=solver, spacing=spacing)
    noise = Draws(0, "noise", range(10))
    x0 = sampler(process, net, (10, 4000), label(0), None, noise)
    assert x0.mean().item() == pytest.approx(0.3, abs=0.01)  # standard error 0.0025
    assert x0.std().item() == pytest.approx(0.5, abs=0.02)  # first-order bias at 200 steps 0.01


def test_grid_goes_from_a_finite_level_to_clean():
    sampler = DiffusionSampler(steps=4, solver=ddim)
    logsnrs = sampler.logsnrs(Diffusion())
    close(logsnrs[1:4], cosine(f64([0.75, 0.5, 0.25])).tolist())
    assert [logsnrs[0], logsnrs[-1]] == [-20, math.inf]
    spaced = DiffusionSampler(steps=8, solver=heun, spacing=karras).logsnrs(Diffusion())
    torch.testing.assert_close(spaced, karras(cosine, 8))


@pytest.mark.parametrize("solver", [ddim, heun, partial(heun, s_churn=5.0)])
def test_progress_counts_steps(solver):
    reports = []
    DiffusionSampler(steps=5, solver=solver)(
        Diffusion(),
        SmallNet(),
        (1, 3, 8, 8),
        label(1),
        None,
        torch.randn,
        lambda done, of, x0: reports.append((done, of)),
    )
    assert sorted(set(reports)) == [(i, 5) for i in range(1, 6)]
    assert reports == sorted(reports)


@pytest.mark.parametrize("known", ["var", "range"])
def test_what_is_known_of_the_variance_passes_guidance_and_threshold(known):
    class Known(Diffusion):
        def denoise(self, net, x_t, logsnr, cond):
            return Denoised(x_t)._replace(**{known: cond.values[:, None].expand_as(x_t)})

    sampler = DiffusionSampler(
        steps=2,
        solver=ancestral,
        scale=2.0,
        guide=guidance.rescale,
        interval=(0.1, 10.0),
        threshold=guidance.static_threshold,
    )
    net = SmallNet()
    denoise = sampler.denoiser(Known(), net, label(1, 2), (net, label(8, 9)))
    out = denoise(torch.tensor([[1.0, 2, 3], [2, 3, 4]]), ZERO)
    assert getattr(out, known).tolist() == [[1] * 3, [2] * 3]
    assert [out.var, out.range].count(None) == 1


def test_autoguidance_leads_away_from_another_network():
    """It is asked under its own condition; scale 1 asks one network alone."""
    net, other, process = SmallNet(), SmallNet(), Diffusion()
    torch.nn.init.normal_(other.first.weight)
    x, logsnr = torch.randn(2, 3, 8, 8), torch.tensor(0.5)
    cond, told = label(1, 2), label(5, 6)
    sampler = DiffusionSampler(steps=4, solver=ddim, scale=2.5)
    guided = sampler.denoiser(process, net, cond, (other, told))(x, logsnr).x0
    strong, weak = (
        process.denoise(net, x, logsnr, cond).x0,
        process.denoise(other, x, logsnr, told).x0,
    )
    torch.testing.assert_close(guided, weak + 2.5 * (strong - weak))
    assert [c.values.tolist() for _, _, c in other.calls] == [[5, 6]] * 2
    other.calls.clear()
    DiffusionSampler(steps=4, solver=ddim).denoiser(process, net, cond, (other, told))(x, logsnr)
    assert not other.calls


def test_a_sampler_takes_a_step():
    with pytest.raises(UserError, match="at least 1"):
        DiffusionSampler(steps=0, solver=ddim)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0)])
def test_an_interval_has_a_low_and_a_high_end(interval):
    with pytest.raises(UserError, match=r"\[low, high\]"):
        DiffusionSampler(steps=4, solver=ddim, interval=interval)


def test_a_limit_may_be_wider():
    x0 = f64([[-20.0, -3, 0.5, 11]])
    out = guidance.static_threshold(constant(x0), limit=10.0)(x0, ZERO).x0
    assert out.tolist() == [[-10, -3, 0.5, 10]]
